#pragma once

#include "../../include/nonlinearity.h"
#include "../capability.h"
#include "../tiling.h"

// The passes of pointwise_conv: a 1x1 convolution of maps whose channels are
// multiplied by gates, sample by sample, and its gradients.

namespace dlkernels {

struct PointwiseConvArgs {
  Tiling tiling;
  Slice in;
  const float* gate;    // [samples, in.count], or null
  const float* weight;  // packed
  Slice out;
};

struct PointwiseConvBackwardArgs {
  Tiling tiling;
  Slice in;     // what `norm` and `activation` make the convolution's input of
  Affine norm;  // mean is null where there is none
  Nonlinearity activation;
  const float* gate;    // [samples, in.count], or null
  const float* weight;  // packed, transposed
  Slice grad_out;
  Slice grad_in;     // of the convolution's input; data is null if not wanted
  float* grad_gate;  // [tiles, in.count]: sums over a tile; null if not wanted
};

// Whether the inputs of a tile lie in scratch memory all at once, or the
// outputs: whichever are fewer.
static inline bool keeps_inputs(int64_t inputs, int64_t outputs) {
  return block_count(inputs) <= block_count(outputs);
}

// Floats of scratch memory of a thread, forward and backward.
static inline int64_t pointwise_scratch_size(
    const Tiling& tiling, int64_t inputs, int64_t outputs) {
  const int64_t blocks =
      2 * (keeps_inputs(inputs, outputs) ? block_count(inputs) : 1) +
      block_count(outputs);
  return tile_length(tiling) * kPitch * blocks;
}

struct PointwiseConvKernels {
  // An item is a group of columns of the packed matrix.
  void (*pack)(const PackWeightArgs&, int64_t begin, int64_t end);
  // weight = the sum of `partial` over threads. An item is a group of outputs.
  void (*unpack)(const UnpackWeightArgs&, int64_t begin, int64_t end);
  // An item is a tile.
  void (*forward)(
      const PointwiseConvArgs&, float* scratch, int64_t begin, int64_t end);
  // An item is a tile; adds to grad_weight, [in, padded_channels(out)], unless
  // that is null.
  void (*backward)(
      const PointwiseConvBackwardArgs&,
      float* grad_weight,
      float* scratch,
      int64_t begin,
      int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(PointwiseConvKernels, pointwise_conv_kernels)

}  // namespace dlkernels
