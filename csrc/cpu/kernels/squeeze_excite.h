#pragma once

#include "../../include/scalar_types.h"
#include "../../include/squeeze_excite.h"
#include "../capability.h"

// The passes of squeeze_excite. Each works on a range of items, so that a
// launcher can share the items out among threads.

namespace dlkernels {

// A batch of maps [samples, channels, area], or [samples, area, channels] when
// channels_last. An item of a pass is a part of one sample: `parts` divide its
// channels, or its area where a pass over channels_last maps allows that.
struct Maps {
  ScalarType dtype;
  bool channels_last;
  int64_t channels;
  int64_t area;
  int64_t parts;
};

struct ScaleArgs {
  Maps maps;
  const void* x;
  const float* scale;    // [samples, channels]
  const void* shortcut;  // like x, or null
  bool relu;
  void* out;
};

struct ScaleBackwardArgs {
  Maps maps;
  const void* grad_out;
  const void* out;  // masks grad_out where given
  const void* x;
  const float* scale;        // [samples, channels]
  const float* grad_pooled;  // [samples, channels]
  void* grad_x;
  void* grad_shortcut;  // or null
};

// out[m, j] = bias[j] + sum_k in[m, k] * weight[j, k]
struct LinearArgs {
  ScalarType dtype;  // of weight and bias
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  const float* in;
  const void* weight;
  const void* bias;  // or null
  float* out;
};

struct SqueezeExciteKernels {
  // pooled[n, c] = mean of x; an item is a part of a sample's channels.
  void (*pool)(
      const Maps&, const void* x, float* pooled, int64_t begin, int64_t end);
  // grad_scale[n, c] = sum of grad_out * x, where out > 0 if out is given.
  void (*pool_backward)(
      const Maps&,
      const void* grad_out,
      const void* out,
      const void* x,
      float* grad_scale,
      int64_t begin,
      int64_t end);
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
  void (*scale_backward)(const ScaleBackwardArgs&, int64_t begin, int64_t end);

  // An item is an output feature.
  void (*linear)(const LinearArgs&, int64_t begin, int64_t end);
  // grad_in[m, k] = sum_j grad_out[m, j] * weight[j, k]; `in` is grad_out and
  // `out` is grad_in. An item is a block of kLinearBlock input features.
  void (*linear_backward)(const LinearArgs&, int64_t begin, int64_t end);
  // grad_weight[j, k] = sum_m grad_out[m, j] * in[m, k] and grad_bias[j]
  // likewise; `out` is grad_out. An item is an output feature.
  void (*linear_weight_backward)(
      const LinearArgs&,
      void* grad_weight,
      void* grad_bias,
      int64_t begin,
      int64_t end);

  void (*activate)(Activation, const float* hidden, float* out, int64_t size);
  // grad becomes grad * activation'(hidden).
  void (*activate_backward)(
      Activation, const float* hidden, float* grad, int64_t size);
  void (*gate)(Gate, float* values, int64_t size);
  // grad becomes grad * gate', of the gate's output.
  void (*gate_backward)(Gate, const float* scale, float* grad, int64_t size);
};

constexpr int64_t kLinearBlock = 64;

DLKERNELS_DECLARE_CPU_KERNELS(SqueezeExciteKernels, squeeze_excite_kernels)

}  // namespace dlkernels
