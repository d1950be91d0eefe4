#pragma once

// How kernels cut maps into tiles, and matrices into blocks. A tile is a
// stretch of pixels whose channels lie in scratch memory, pixel by pixel, so
// that a convolution is a matrix product on memory that is in cache, whatever
// the layout of the maps.

#include "../include/scalar_types.h"

namespace dlkernels {

// The pixels of a batch of maps.
struct Grid {
  int64_t samples;
  int64_t height;
  int64_t width;
};

// `count` channels, from `first` on, of maps [samples, channels, height, width]
// or, when channels_last, [samples, height, width, channels].
struct Slice {
  void* data;
  ScalarType dtype;
  bool channels_last;
  int64_t channels;
  int64_t first;
  int64_t count;
};

// z = (x - mean) * scale + shift, per channel.
struct Affine {
  const float* mean;
  const float* scale;
  const float* shift;
};

// How a grid is cut into tiles: whole rows of one sample, with the neighbours
// that a 3x3 kernel needs, or for a 1x1 kernel any stretch of pixels.
struct Tiling {
  Grid grid;
  int64_t halo;   // 1 for 3x3, 0 for 1x1
  int64_t size;   // rows per tile, or pixels where there is no halo
  int64_t bands;  // tiles per sample, or 0 where tiles span samples
  int64_t tiles;
};

// Enough pixels to amortise the weights, few enough to stay in L2.
constexpr int64_t kTilePixels = 224;

static inline Tiling tiling_of(const Grid& grid, int64_t kernel) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t total = grid.samples * grid.height * grid.width;
  if (total == 0) {
    return {grid, kernel / 2, 1, 0, 0};
  }
  if (kernel == 1) {
    return {grid, 0, kTilePixels, 0, ceil_div(total, kTilePixels)};
  }
  const int64_t bands =
      ceil_div(grid.height * (grid.width + 1), 2 * kTilePixels);
  // Tiles of minimal filtering have two rows.
  const int64_t rows = 2 * ceil_div(grid.height, 2 * bands);
  const int64_t used = ceil_div(grid.height, rows);
  return {grid, 1, rows, used, used * grid.samples};
}

// Of a 1x1 kernel, with tiles that each lie in one sample.
static inline Tiling tiling_of_samples(const Grid& grid) {
  const int64_t area = grid.height * grid.width;
  if (area * grid.samples == 0) {
    return {grid, 0, 1, 1, 0};
  }
  const int64_t bands = (area + kTilePixels - 1) / kTilePixels;
  const int64_t size = (area + bands - 1) / bands;
  const int64_t used = (area + size - 1) / size;
  return {grid, 0, size, used, used * grid.samples};
}

static inline int64_t pixels_of(const Tiling& tiling, int64_t tile) {
  const Grid& grid = tiling.grid;
  const bool by_sample = tiling.bands != 0;
  const int64_t area = grid.height * grid.width;
  const int64_t pixels = by_sample ? area : grid.samples * area;
  const int64_t extent = tiling.halo != 0 ? grid.height : pixels;
  const int64_t first = (by_sample ? tile % tiling.bands : tile) * tiling.size;
  const int64_t rest = extent - first;
  const int64_t count = rest < tiling.size ? rest : tiling.size;
  return tiling.halo != 0 ? count * grid.width : count;
}

// Tiles in scratch memory are cut into blocks of this many channels. The pitch
// from pixel to pixel is one cache line longer, so that a channel's values in
// successive pixels fall into different sets of the cache.
constexpr int64_t kBlock = 128;
constexpr int64_t kPitch = kBlock + 16;

static inline int64_t block_count(int64_t channels) {
  return (channels + kBlock - 1) / kBlock;
}

// Pixels of a tile in scratch memory, its halo included.
static inline int64_t tile_length(const Tiling& tiling) {
  return tiling.halo == 0 ? tiling.size
                          : (tiling.size + 2) * (tiling.grid.width + 1) + 1;
}

// Columns of weights are padded to whole groups.
constexpr int64_t kChannelGroup = 16;

static inline int64_t group_count(int64_t channels) {
  return (channels + kChannelGroup - 1) / kChannelGroup;
}

static inline int64_t padded_channels(int64_t channels) {
  return group_count(channels) * kChannelGroup;
}

// The weight of a 1x1 convolution, as a matrix from inputs to outputs.
struct PackWeightArgs {
  const void* weight;  // [out, in]
  ScalarType dtype;
  int64_t in;
  int64_t out;
  // For the gradient of the input: the matrix from outputs to inputs.
  bool transposed;
  float* packed;  // packed_weight_size of (in, out), or of (out, in)
};

static inline int64_t packed_weight_size(int64_t in, int64_t out) {
  return in * padded_channels(out);
}

struct UnpackWeightArgs {
  const float* partial;  // [threads, in, padded_channels(out)]
  int64_t threads;
  int64_t in;
  int64_t out;
  void* weight;  // [out, in]
  ScalarType dtype;
};

}  // namespace dlkernels
