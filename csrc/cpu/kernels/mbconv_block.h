#pragma once

#include "mbconv.h"

// An inverted residual block in evaluation, its batch norms folded into weights
// and biases:
//
//   hidden = act(depthwise(act(expand(x))))
//   out = project(gate * hidden) + x
//
// The expanded maps never leave the caches: a tile of their channels is
// computed a few rows at a time, as the depthwise convolution needs them. All
// maps inside have a layout of their own, [groups, pixels, kGroup], from which
// products read neighbouring pixels at fixed distances.
//
// An item of a pass is a part of one sample of a chunk; a launcher shares them
// out among threads.

namespace dlkernels {

struct MbconvBlockArgs {
  DepthwiseShape shape;  // of the depthwise convolution, samples of the chunk
  int64_t in_channels;
  int64_t out_channels;
  bool channels_last;  // x and out
  bool has_residual;
  Nonlinearity expand_activation;
  Nonlinearity depthwise_activation;

  // Weights as pack_matrix leaves them, and biases of whole tiles.
  const float* expand_weight;  // or null: the input is what is convolved
  const float* expand_bias;
  const float* depthwise_weight;  // [groups, kernel * kernel, kGroup]
  const float* depthwise_bias;
  const float* project_weight;
  const float* project_bias;

  const void* x;
  float* input;       // [samples, input groups, area + slack, kGroup]
  float* hidden;      // [samples, groups, out area + slack, kGroup]
  float* pooled;      // [samples, bands, groups * kGroup], sums; or null
  const float* gate;  // [samples, channels], or null
  void* out;

  // Items of a sample: bands of rows for each tile of hidden channels, and
  // parts of the pixels for each tile of output channels.
  int64_t bands;
  int64_t parts;
};

// Pixels behind a map that a product may read.
constexpr int64_t kPixelSlack = 16;

// A matrix [rows, depth] with a factor for each row.
struct PackMatrixArgs {
  int64_t rows;
  int64_t depth;
  const float* weight;
  const float* factor;
  float* packed;  // [tiles, depth, channels of a tile]
};

struct MbconvBlockKernels {
  int64_t tile;  // channels that a product computes at a time

  int64_t (*scratch_floats)(const MbconvBlockArgs&);
  // An item is a tile.
  void (*pack_matrix)(const PackMatrixArgs&, int64_t begin, int64_t end);
  // input from x; an item is a group of input channels of a sample.
  void (*gather)(const MbconvBlockArgs&, int64_t begin, int64_t end);
  // hidden, and the sums of its bands in pooled, from input.
  void (*convolve)(
      const MbconvBlockArgs&, float* scratch, int64_t begin, int64_t end);
  // out from hidden.
  void (*project)(
      const MbconvBlockArgs&, float* scratch, int64_t begin, int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(MbconvBlockKernels, mbconv_block_kernels)

}  // namespace dlkernels
