#pragma once

#include "../../include/nonlinearity.h"
#include "../../include/scalar_types.h"
#include "../capability.h"

// The passes of batch_norm_act. Each works on a range of items, so that a
// launcher can share the items out among threads.
//
// Contiguous maps are worked on channel by channel: all samples of a channel go
// through every pass while they lie in cache. channels_last maps stream, pass
// after pass, in blocks of `rows_per_block` pixels of one sample; what a pass
// reduces it writes per block, and a second one combines the blocks in order.

namespace dlkernels {

struct BatchNormActArgs {
  ScalarType dtype;
  int64_t samples;
  int64_t channels;
  int64_t area;
  int64_t rows_per_block;
  int64_t blocks_per_sample;

  Nonlinearity activation;
  float negative_slope;
  bool batch_statistics;
  float eps;

  const float* weight;        // [channels], or null
  const float* bias;          // [channels]
  const float* sample_scale;  // [samples], or null
  float* mean;                // [channels]; written if batch_statistics
  float* var;
  float* scale;    // [channels], scratch: weight / sqrt(var + eps)
  float* partial;  // [samples, blocks, 2, channels], scratch of channels_last
  const void* x;
  const void* residual;  // like x, or null
  void* out;
  float* pooled;  // [samples, channels], or null

  const void* grad_out;
  const float* grad_pooled;  // [samples, channels], or null
  void* grad_x;
  float* grad_weight;  // [channels]
  float* grad_bias;
};

struct BatchNormActKernels {
  // Contiguous maps; an item is a channel.
  void (*forward)(const BatchNormActArgs&, int64_t begin, int64_t end);
  void (*backward)(const BatchNormActArgs&, int64_t begin, int64_t end);

  // channels_last maps; an item is a block, or a channel where it combines.
  void (*statistics)(const BatchNormActArgs&, int64_t begin, int64_t end);
  void (*combine_statistics)(
      const BatchNormActArgs&, int64_t begin, int64_t end);
  // An item is a channel.
  void (*set_scales)(const BatchNormActArgs&, int64_t begin, int64_t end);
  void (*apply)(const BatchNormActArgs&, int64_t begin, int64_t end);
  // pooled[n, c]; an item is a sample.
  void (*combine_pooled)(const BatchNormActArgs&, int64_t begin, int64_t end);
  void (*gradient_sums)(const BatchNormActArgs&, int64_t begin, int64_t end);
  void (*combine_gradients)(
      const BatchNormActArgs&, int64_t begin, int64_t end);
  void (*input_gradient)(const BatchNormActArgs&, int64_t begin, int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(BatchNormActKernels, batch_norm_act_kernels)

}  // namespace dlkernels
