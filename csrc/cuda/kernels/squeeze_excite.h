#pragma once

#include "../../include/scalar_types.h"
#include "../../include/squeeze_excite.h"
#include "../stream.h"

namespace dlkernels::cuda {

// A batch of maps [samples, channels, area], or [samples, area, channels] when
// channels_last.
struct Maps {
  ScalarType dtype;
  bool channels_last;
  int64_t samples;
  int64_t channels;
  int64_t area;
};

// Into how many stretches the area of a sample is cut to be summed.
int64_t splits_of(const Maps& maps);

struct SqueezeExcite {
  Maps maps;
  int64_t squeezed;
  Activation activation;
  Gate gate;
  bool relu;  // after the shortcut was added
  const void* x;
  const void* reduce_weight;
  const void* reduce_bias;  // or null
  const void* expand_weight;
  const void* expand_bias;  // or null
  const void* shortcut;     // or null
  float* partial;           // [samples, splits, channels], workspace
  void* out;
  float* pooled;
  float* hidden;
  float* scale;
};

void squeeze_excite(const SqueezeExcite& args, Stream stream);

struct SqueezeExciteBackward {
  Maps maps;
  int64_t squeezed;
  Activation activation;
  Gate gate;
  const void* grad_out;
  const void* x;
  const void* reduce_weight;
  const void* expand_weight;
  const void* out;  // masks grad_out where given
  const float* pooled;
  const float* hidden;
  const float* scale;
  float* partial;      // [samples, splits, channels], workspace
  float* grad_logits;  // [samples, channels], workspace
  float* grad_hidden;  // [samples, squeezed], workspace
  float* grad_pooled;  // [samples, channels], workspace
  void* grad_x;
  void* grad_reduce_weight;
  void* grad_reduce_bias;
  void* grad_expand_weight;
  void* grad_expand_bias;
  void* grad_shortcut;  // or null
};

void squeeze_excite_backward(const SqueezeExciteBackward& args, Stream stream);

}  // namespace dlkernels::cuda
