#pragma once

#include "../capability.h"
#include "../tiling.h"
#include "conv3x3.h"

// The passes of dense_block: batch norm + ReLU + convolution from one slice of
// channels to another, 1x1 or 3x3, stride 1 and zero padding, forward and
// backward.
//
// A pass works tile by tile. A tile is a stretch of pixels whose normalised
// channels lie in scratch memory, pixel by pixel, so that the convolution is a
// matrix product on memory that is in cache, whatever the layout of the maps.

namespace dlkernels {

// Dropout multiplies a value by `scale` where `kept`, by zero elsewhere.
struct Dropout {
  const uint8_t* kept;  // [samples, height, width, count of the slice], or null
  float scale;
};

// 3x3 convolutions are minimal filtering, see conv3x3.h. At most so many tiles
// of 2x2 outputs are worked on together, and so many channels are one panel of
// outputs, or rows of the gradient of a weight.
constexpr int64_t kMaxFilterTiles = 30;
constexpr int64_t kMaxPanel = 32;
constexpr int64_t kMaxChannelRows = 8;

// Floats of scratch memory for any pass to `out` channels.
static inline int64_t scratch_size(const Tiling& tiling, int64_t out) {
  const int64_t blocks = tile_length(tiling) * kPitch * (block_count(out) + 3);
  const int64_t elements = kElements * kMaxFilterTiles * 2 * kPitch;
  return blocks + (tiling.halo == 0 ? 0 : elements);
}

static inline int64_t pool_scratch_size(const Grid& grid) {
  return 5 * grid.width * kPitch;
}

// A weight is packed as a matrix [in, out] of blocks if its kernel is 1x1, as
// PackConv3x3Args has it if it is 3x3.
static inline int64_t packed_size(int64_t kernel, int64_t in, int64_t out) {
  return kernel == 1 ? packed_weight_size(in, out)
                     : kElements * in * (out + kMaxPanel);
}

// Of a weight's gradient: [in, padded_channels(out)], or of the elements of
// its kernels.
static inline int64_t gradient_size(int64_t kernel, int64_t in, int64_t out) {
  const int64_t rows = in + block_count(in) * kMaxChannelRows;
  return kernel == 1 ? in * padded_channels(out)
                     : kElements * rows * (out + kMaxPanel);
}

struct PackArgs {
  const void* weight;  // [out, in, kernel, kernel]
  bool channels_last;  // or contiguous
  ScalarType dtype;
  int64_t kernel;
  int64_t in;
  int64_t out;
  // For the gradient of the input: the matrix from outputs to inputs.
  bool transposed;
  float* packed;  // packed_size of (in, out), or of (out, in) if transposed
};

struct UnpackArgs {
  const float* partial;  // [threads, gradient_size]
  int64_t threads;
  int64_t kernel;
  int64_t in;
  int64_t out;
  void* weight;  // [out, in, kernel, kernel]
  ScalarType dtype;
};

struct ConvArgs {
  Tiling tiling;
  Slice in;
  Affine norm;
  const float* weight;  // packed
  Slice out;
  Dropout dropout;
  float* moments;  // [tiles, 2, out.count]: mean and sum of squares about it
};

struct ConvBackwardArgs {
  Tiling tiling;
  Slice in;
  Affine norm;
  const float* weight;  // packed, transposed
  // The gradient of `out` is grad_out plus what comes through the statistics
  // of `out`, which `correction` applies to the values of `out`.
  Slice grad_out;
  Slice out;
  Affine correction;  // mean is null where there is none
  Dropout dropout;
  // grad_in becomes grad_before, where that is given, plus this convolution's
  // share, apart from what comes through the statistics of `in`.
  Slice grad_before;  // data is null where there is none
  float* grad_in;     // [samples, height, width, grad_in_channels]
  int64_t grad_in_channels;
};

// What each thread sums over its tiles.
struct ConvGradients {
  float* weight;  // gradient_size
  float* sums;    // [2, in]: sum of grad_z and of grad_z * (x - mean)
};

struct CopyArgs {
  Tiling tiling;  // of kernel 1
  Slice in;
  Slice values;
  Affine correction;  // mean is null where there is none
  Slice out;
  float* moments;  // as in ConvArgs, or null
};

struct MomentsArgs {
  Tiling tiling;  // of kernel 1
  Slice in;
  float* moments;  // as in ConvArgs
};

// Batch norm, ReLU and 2x2 average pool with stride 2, which drops an odd last
// row or column.
struct PoolArgs {
  Grid grid;  // of `in`; the results have half its height and width
  Slice in;
  Affine norm;
  Slice out;
};

struct PoolBackwardArgs {
  Grid grid;
  Slice in;
  Affine norm;
  Slice grad_out;
  Affine correction;  // mean is null where there is none
  Slice grad_in;      // data is null where it is not wanted
};

struct DenseBlockKernels {
  // An item is a group of columns of the packed matrix.
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);
  // weight = the sum of `partial` over threads. An item is a group of outputs.
  void (*unpack)(const UnpackArgs&, int64_t begin, int64_t end);
  // out = dropout(convolution of relu(norm(in))). An item is a tile.
  void (*conv)(const ConvArgs&, float* scratch, int64_t begin, int64_t end);
  // An item is a tile; adds to `gradients`.
  void (*conv_backward)(
      const ConvBackwardArgs&,
      const ConvGradients& gradients,
      float* scratch,
      int64_t begin,
      int64_t end);
  // out = in + correction(values). An item is a tile.
  void (*copy)(const CopyArgs&, float* scratch, int64_t begin, int64_t end);
  // An item is a tile.
  void (*moments)(
      const MomentsArgs&, float* scratch, int64_t begin, int64_t end);
  // An item is a row of results; pool_scratch_size floats of scratch memory.
  void (*pool)(const PoolArgs&, float* scratch, int64_t begin, int64_t end);
  // An item is a pair of rows of `in`, or an odd last row. Adds to `sums`,
  // [2, in.count], which are those of ConvGradients, unless null.
  void (*pool_backward)(
      const PoolBackwardArgs&,
      float* sums,
      float* scratch,
      int64_t begin,
      int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(DenseBlockKernels, dense_block_kernels)

}  // namespace dlkernels
