#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"

// 3x3 convolutions of stride 1 by Winograd's minimal filtering F(2x2, 3x3)
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016):
//
//   2x2 outputs = A^T [sum over channels of (G g G^T) * (B^T d B)] A
//
// of the kernels g and the 4x4 inputs d. The sums are a matrix product of tiles
// by channels for each of the 16 elements: 16 products where the plain sum
// takes 36. The gradient of x is such a convolution, too, with turned kernels;
// that of the weight follows the same formula backward.

namespace dlkernels {

constexpr int64_t kElements = 16;

struct Conv3x3Shape {
  ScalarType dtype;
  bool channels_last;  // x and out
  int64_t samples;
  int64_t in_channels;
  int64_t out_channels;
  int64_t height;  // of x
  int64_t width;
  int64_t padding;  // 0 to 2

  int64_t out_height() const {
    return height + 2 * padding - 2;
  }
  int64_t out_width() const {
    return width + 2 * padding - 2;
  }
  // Tiles of 2x2 outputs.
  int64_t tile_rows() const {
    return (out_height() + 1) / 2;
  }
  int64_t tile_columns() const {
    return (out_width() + 1) / 2;
  }
  int64_t tiles() const {
    return samples * tile_rows() * tile_columns();
  }
};

// Transformed weights are [panels, kElements, in_channels, channels of a
// panel]: a panel is the output channels that a product computes at a time.
struct PackConv3x3Args {
  ScalarType dtype;
  bool channels_last;  // the weight
  int64_t in_channels;
  int64_t out_channels;
  bool turned;  // pack the kernels of the gradient of x
  const void* weight;
  float* packed;
};

struct Conv3x3Args {
  Conv3x3Shape shape;
  const void* x;
  const float* weight;  // packed
  const void* bias;     // [out_channels], or null
  void* out;
};

// The gradient of the transformed weight grows by that of one block of tiles
// after the other.
struct Conv3x3WeightArgs {
  Conv3x3Shape shape;
  const void* x;
  const void* grad_out;
  int64_t first;    // tile of the block
  int64_t count;    // of its tiles
  int64_t room;     // for tiles
  float* elements;  // of inputs and outputs, tile_floats for each tile
  float* total;     // total_floats
};

struct UnpackConv3x3Args {
  Conv3x3Shape shape;
  const float* total;
  void* grad_weight;  // contiguous
};

struct Conv3x3Kernels {
  int64_t panel;
  int64_t group;  // tiles that a product computes at a time

  int64_t (*scratch_floats)(const Conv3x3Shape&);
  int64_t (*tile_floats)(const Conv3x3Shape&);
  int64_t (*total_floats)(const Conv3x3Shape&);
  // An item is a panel.
  void (*pack)(const PackConv3x3Args&, int64_t begin, int64_t end);
  // An item is a group of tiles; the outputs are those of the panels from
  // first_panel on, before stop_panel.
  void (*forward)(
      const Conv3x3Args&,
      float* scratch,
      int64_t first_panel,
      int64_t stop_panel,
      int64_t begin,
      int64_t end);
  // An item is a tile of the block.
  void (*transform)(const Conv3x3WeightArgs&, int64_t begin, int64_t end);
  // An item is an element of a panel.
  void (*multiply)(const Conv3x3WeightArgs&, int64_t begin, int64_t end);
  // An item is a panel.
  void (*unpack)(const UnpackConv3x3Args&, int64_t begin, int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(Conv3x3Kernels, conv3x3_kernels)

}  // namespace dlkernels
