#pragma once

#include "../../include/scalar_types.h"
#include "../../include/squeeze_excite.h"
#include "../capability.h"

// The passes of squeeze_excite. Each works on a range of items, so that a
// launcher can share the items out among threads.

namespace dlkernels {

// A batch of maps [samples, channels, area], or [samples, area, channels] when
// channels_last. An item of a pass is a part of one sample: `parts` divide its
// channels, or its area when channels_last.
struct Maps {
  ScalarType dtype;
  bool channels_last;
  int64_t channels;
  int64_t area;
  int64_t parts;
  bool streamed;  // results are too large to stay in cache
};

// Pointers are to the first sample of a group of them.
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
  const void* out;           // masks grad_out where given
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

constexpr int64_t kLinearBlock = 32;

struct SqueezeExciteKernels {
  // sums[n, p, c] = the sum of x over part p of sample n, [samples, parts,
  // channels] when channels_last; [samples, channels] otherwise.
  void (*pool)(
      const Maps&, const void* x, float* sums, int64_t begin, int64_t end);
  // Likewise the sums of grad_out * x, where out > 0 if out is given.
  void (*pool_backward)(
      const Maps&,
      const void* grad_out,
      const void* out,
      const void* x,
      float* sums,
      int64_t begin,
      int64_t end);
  // out[n, c] = factor * the sum over parts of sums[n, p, c].
  void (*combine)(
      const Maps&,
      int64_t samples,
      const float* sums,
      float factor,
      float* out);
  // Items, and what lies in them, are scaled last to first: what the sums read
  // last is still in cache.
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
  void (*scale_backward)(const ScaleBackwardArgs&, int64_t begin, int64_t end);

  // The passes of a layer; an item is a block of kLinearBlock features.
  // Over blocks of output features:
  void (*linear)(const LinearArgs&, int64_t begin, int64_t end);
  // grad_in[m, k] = sum_j grad_out[m, j] * weight[j, k]; `in` is grad_out and
  // `out` is grad_in. Over blocks of input features:
  void (*linear_backward)(const LinearArgs&, int64_t begin, int64_t end);
  // grad_weight[j, k] = sum_m grad_out[m, j] * in[m, k] and grad_bias[j]
  // likewise; `out` is grad_out. Over blocks of output features:
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

DLKERNELS_DECLARE_CPU_KERNELS(SqueezeExciteKernels, squeeze_excite_kernels)

}  // namespace dlkernels
