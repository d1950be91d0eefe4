#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"

// The passes of residual_sum over maps. Each works on a range of items, so that
// a launcher can share the items out among threads: of contiguous maps an item
// is the plane of one sample's channel, of channels_last maps a block of
// `rows_per_block` pixels of one sample. What blocks reduce, `combine_*` adds
// up in order.

namespace dlkernels {

struct ResidualSumArgs {
  ScalarType dtype;
  bool channels_last;
  int64_t samples;
  int64_t channels;
  int64_t area;
  int64_t rows_per_block;
  int64_t blocks_per_sample;

  const void* x;
  const float* mean;  // [channels]
  // Sums of two values per item and channel: [samples, channels, 2] or
  // [samples, blocks_per_sample, 2, channels].
  float* partial;
  float* first;  // [samples, channels]
  float* second;

  const float* slope;   // [samples, channels]
  const float* offset;  // [samples, channels]
  const float* tilt;    // [channels]
  const void* shortcut;
  bool relu;
  void* out;

  const void* grad_out;
  const void*
      mask;  // grad_out counts where it is positive; null for everywhere
  void* grad_x;
  void* grad_shortcut;  // or null
};

struct ResidualSumKernels {
  // first, second = mean of x, and sum of squared deviations from it.
  void (*moments)(const ResidualSumArgs&, int64_t begin, int64_t end);
  // The same from blocks; an item is a sample.
  void (*combine_moments)(const ResidualSumArgs&, int64_t begin, int64_t end);
  // out = relu((x - mean) * slope + offset + shortcut)
  void (*apply)(const ResidualSumArgs&, int64_t begin, int64_t end);
  // first, second = sum of grad_out, and of grad_out * (x - mean)
  void (*sums)(const ResidualSumArgs&, int64_t begin, int64_t end);
  void (*combine_sums)(const ResidualSumArgs&, int64_t begin, int64_t end);
  // grad_shortcut = grad_out
  // grad_x = grad_out * slope + offset + (x - mean) * tilt
  void (*gradient)(const ResidualSumArgs&, int64_t begin, int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(ResidualSumKernels, residual_sum_kernels)

}  // namespace dlkernels
