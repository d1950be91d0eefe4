#include "mbconv_block.h"

#include <type_traits>

#include "../depthwise.h"
#include "../nonlinearity.h"
#include "../transpose.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

using Args = MbconvBlockArgs;

// A product of kRows pixels and kTile channels fills the vector registers.
#if defined(__AVX512F__)
constexpr int64_t kTile = 32;
constexpr int kRows = 14;
#elif defined(__AVX2__)
constexpr int64_t kTile = 16;
constexpr int kRows = 6;
#else
constexpr int64_t kTile = 16;
constexpr int kRows = 3;
#endif
constexpr int kTileVecs = kTile / kVecSize;
constexpr int64_t kTileGroups = kTile / kGroup;

// Pixels whose products are written together; whole vectors of them.
constexpr int64_t kStrip = 8 * kRows;

// Of the first-level cache, for the rows of a group.
constexpr int64_t kRingFloats = 4096;

DLKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

DLKERNELS_INLINE int64_t ceil_of(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// ---- products -----------------------------------------------------------

// to[pixel, column] = sum over k of a[pixel, k] * b[k, column], the channels k
// of a in groups that lie `step` apart.
template <int kVecs>
DLKERNELS_NOINLINE void multiply_pixels(
    const float* a, int64_t step, int64_t depth, const float* b, float* to) {
  Vec total[kRows][kVecs];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      total[row][v] = Vec{};
    }
  }
  for (int64_t first = 0; first < depth; first += kGroup) {
    const float* const end = a + smaller(kGroup, depth - first);
#pragma GCC unroll 1
    for (const float* k = a; k < end; ++k) {
      Vec columns[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        columns[v] = load(b + v * kVecSize);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Vec value = broadcast(k[row * kGroup]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          total[row][v] += value * columns[v];
        }
      }
      b += kTile;
    }
    a += step;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      store(to + row * kTile + v * kVecSize, total[row][v]);
    }
  }
}

// For the first vectors of a tile.
template <int kVecs = kTileVecs>
DLKERNELS_INLINE void multiply(
    int64_t vecs,
    const float* a,
    int64_t step,
    int64_t depth,
    const float* b,
    float* to) {
  if constexpr (kVecs > 0) {
    if (vecs == kVecs) {
      multiply_pixels<kVecs>(a, step, depth, b, to);
    } else {
      multiply<kVecs - 1>(vecs, a, step, depth, b, to);
    }
  }
}

void pack_matrix(const PackMatrixArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin * kTile; row < end * kTile; row += kVecSize) {
    float* to = args.packed + row / kTile * kTile * args.depth + row % kTile;
    for_each_vec(args.depth, [&](int64_t k, auto lanes) {
      Vec values[kVecSize];
      for (int64_t i = 0; i < kVecSize; ++i) {
        const int64_t r = row + i;
        values[i] =
            r < args.rows
                ? load(args.weight + r * args.depth + k, lanes) * args.factor[r]
                : Vec{};
      }
      transpose(values);
      const int64_t count = smaller(kVecSize, args.depth - k);
      for (int64_t i = 0; i < count; ++i) {
        store(to + (k + i) * kTile, values[i]);
      }
    });
  }
}

// ---- the input ----------------------------------------------------------

// From a group of a map to the next one.
int64_t group_step(int64_t area) {
  return (area + kPixelSlack) * kGroup;
}

// Some channels of a sample: a vector of each pixel.
template <typename T, typename Lanes>
DLKERNELS_INLINE void gather_pixels(
    const T* x, int64_t area, int64_t channels, Lanes lanes, float* to) {
  for (int64_t p = 0; p < area; ++p) {
    store(to + p * kGroup, load(x + p * channels, lanes));
  }
}

// The same from planes, `count` of them.
template <typename T>
DLKERNELS_INLINE void gather_planes(
    const T* x, int64_t area, int64_t count, float* to) {
  for_each_vec(area, [&](int64_t p, auto lanes) {
    Vec values[kVecSize];
    for (int64_t i = 0; i < kVecSize; ++i) {
      values[i] = i < count ? load(x + i * area + p, lanes) : Vec{};
    }
    transpose(values);
    const int64_t pixels = smaller(kVecSize, area - p);
    for (int64_t i = 0; i < pixels; ++i) {
      store(to + (p + i) * kGroup, values[i]);
    }
  });
}

void gather(const Args& args, int64_t begin, int64_t end) {
  const int64_t channels = args.in_channels;
  const int64_t groups = ceil_of(channels, kGroup);
  const int64_t area = area_of(args.shape);
  dispatch(args.shape.dtype, [&](auto* tag) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t item = begin; item < end; ++item) {
      const auto* sample = x + item / groups * channels * area;
      const int64_t first = item % groups * kGroup;
      float* to = args.input + item * group_step(area);
      for_each_vec(
          smaller(kGroup, channels - first), [&](int64_t part, auto lanes) {
            const int64_t c = first + part;
            if (args.channels_last) {
              gather_pixels(sample + c, area, channels, lanes, to + part);
            } else {
              const int64_t count = smaller(kVecSize, channels - c);
              gather_planes(sample + c * area, area, count, to + part);
            }
          });
    }
  });
}

// ---- expansion and depthwise convolution --------------------------------

struct ConvolveScratch {
  Pixels ring;        // of the tile's first group
  int64_t ring_step;  // to that of the next group
  int64_t band;       // rows of outputs that are worked on together
  float* products;    // [kRows, kTile]
  float* row;         // of outputs
  int64_t taken;

  ConvolveScratch(const DepthwiseShape& shape, Scratch scratch) {
    ring = take_ring(shape, kRingFloats, scratch);
    ring_step = (ring.mask + 1) * ring.stride;
    scratch.take((kTileGroups - 1) * ring_step);
    band = band_of(shape, ring);
    products = scratch.take(kRows * kTile);
    row = scratch.take(shape.out_width * kGroup);
    taken = scratch.taken();
  }

  Pixels group(int64_t index) const {
    return {ring.data + index * ring_step, ring.stride, ring.mask};
  }
};

// The part of the hidden channels that an item works on.
struct HiddenTile {
  int64_t sample;
  int64_t first;   // channel
  int64_t groups;  // of channels
};

// Walks over the pixels of a map and their places in a ring.
class Walk {
 public:
  DLKERNELS_MEMBER Walk(
      const DepthwiseShape& shape, const Pixels& ring, int64_t pixel)
      : shape_(shape), ring_(ring), y_(pixel / shape.width) {
    const int64_t fitting = columns_read(shape) - shape.pad_left;
    width_ = smaller(fitting, shape.width);
    x_ = pixel % shape.width;
    start_row();
  }

  // The place in the ring, or null for columns that no output reads.
  DLKERNELS_MEMBER float* place() const {
    return x_ < width_ ? row_ + x_ * kGroup : nullptr;
  }

  DLKERNELS_MEMBER void advance() {
    if (++x_ == shape_.width) {
      x_ = 0;
      ++y_;
      start_row();
    }
  }

 private:
  DLKERNELS_MEMBER void start_row() {
    row_ = ring_.at(y_ + shape_.pad_top, shape_.pad_left);
  }

  const DepthwiseShape& shape_;
  const Pixels& ring_;
  int64_t width_;
  int64_t x_;
  int64_t y_;
  float* row_;
};

// Puts act(products + bias) of `count` pixels in their places.
template <typename Act>
DLKERNELS_NOINLINE void place_products(
    const Args& args,
    const ConvolveScratch& scratch,
    const Act& act,
    const HiddenTile& tile,
    int64_t pixel,
    int64_t count) {
  const float* bias = args.expand_bias + tile.first;
  Walk walk(args.shape, scratch.ring, pixel);
  for (int64_t i = 0; i < count; ++i) {
    if (float* to = walk.place()) {
      const float* from = scratch.products + i * kTile;
      for (int64_t c = 0; c < tile.groups * kGroup; c += kVecSize) {
        const Vec value = load(from + c) + load(bias + c);
        store(
            to + c / kGroup * scratch.ring_step + c % kGroup, act.value(value));
      }
    }
    walk.advance();
  }
}

// Fills the rings with the pixels [begin, end) of the expanded map.
void expand(
    const Args& args,
    const ConvolveScratch& scratch,
    const HiddenTile& tile,
    int64_t begin,
    int64_t end) {
  const int64_t step = group_step(area_of(args.shape));
  const float* input =
      args.input + tile.sample * ceil_of(args.in_channels, kGroup) * step;
  const float* weight = args.expand_weight + tile.first * args.in_channels;
  const int64_t vecs = tile.groups * kGroup / kVecSize;
  with_nonlinearity(args.expand_activation, 0.0f, [&](auto act) {
    for (int64_t p = begin; p < end; p += kRows) {
      multiply(
          vecs,
          input + p * kGroup,
          step,
          args.in_channels,
          weight,
          scratch.products);
      place_products(args, scratch, act, tile, p, smaller(kRows, end - p));
    }
  });
}

// Where nothing is expanded.
void copy_input(
    const Args& args,
    const ConvolveScratch& scratch,
    const HiddenTile& tile,
    int64_t begin,
    int64_t end) {
  const int64_t step = group_step(area_of(args.shape));
  const int64_t groups = ceil_of(args.in_channels, kGroup);
  for (int64_t g = 0; g < tile.groups; ++g) {
    const Pixels ring = scratch.group(g);
    const float* from =
        args.input + (tile.sample * groups + tile.first / kGroup + g) * step;
    Walk walk(args.shape, ring, begin);
    for (int64_t p = begin; p < end; ++p) {
      if (float* to = walk.place()) {
        for (int64_t c = 0; c < kGroup; c += kVecSize) {
          store(to + c, load(from + p * kGroup + c));
        }
      }
      walk.advance();
    }
  }
}

// Fills the padded rows [begin, end) of the rings.
void fill(
    const Args& args,
    const ConvolveScratch& scratch,
    const HiddenTile& tile,
    int64_t begin,
    int64_t end) {
  const DepthwiseShape& shape = args.shape;
  const auto row_of = [&](int64_t padded) {
    const int64_t y = padded - shape.pad_top;
    return y < 0 ? 0 : smaller(y, shape.height);
  };
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = i - shape.pad_top;
    for (int64_t g = 0; g < tile.groups && (y < 0 || y >= shape.height); ++g) {
      float* row = scratch.group(g).at(i, 0);
      for (int64_t c = 0; c < kGroup; c += kVecSize) {
        clear_pixels(row + c, columns_read(shape));
      }
    }
  }
  const auto pixels = args.expand_weight == nullptr ? copy_input : expand;
  pixels(
      args,
      scratch,
      tile,
      row_of(begin) * shape.width,
      row_of(end) * shape.width);
}

using ConvolveRow = decltype(&convolve_row_of_pixels<3, 1>);

ConvolveRow convolution_of(const DepthwiseShape& shape) {
  return with_sizes(shape, [](auto kernel, auto stride) -> ConvolveRow {
    return convolve_row_of_pixels<kernel.value, stride.value>;
  });
}

// Writes act(convolution + bias) of the rows of a band, for a vector of
// channels from c on that begins at `part` of its group's ring, and adds them
// to sums.
template <typename Act>
DLKERNELS_NOINLINE void convolve_band(
    const Args& args,
    const ConvolveScratch& scratch,
    const Act& act,
    const Pixels& ring,
    ConvolveRow convolve_row,
    int64_t sample,
    int64_t c,
    const Band& band,
    float* sums) {
  const DepthwiseShape& shape = args.shape;
  const int64_t group = c / kGroup;
  const int64_t part = c % kGroup;
  const int64_t taps = shape.kernel * shape.kernel;
  const float* weight = args.depthwise_weight + group * taps * kGroup + part;
  const int64_t map = sample * ceil_of(shape.channels, kGroup) + group;
  float* out = args.hidden + map * group_step(out_area_of(shape)) +
               band.first * shape.out_width * kGroup + part;
  const Vec bias = load(args.depthwise_bias + c);
  const Pixels in{ring.data + part, ring.stride, ring.mask};
  Vec total = load(sums);
  for (int64_t y = band.first; y < band.end(); ++y) {
    convolve_row(in, weight, y, shape.out_width, scratch.row);
    Vec row{};
    for (int64_t x = 0; x < shape.out_width; ++x) {
      const Vec value = act.value(load(scratch.row + x * kGroup) + bias);
      store(out + x * kGroup, value);
      row += value;
    }
    out += shape.out_width * kGroup;
    total += row;
  }
  store(sums, total);
}

void convolve(const Args& args, float* memory, int64_t begin, int64_t end) {
  const DepthwiseShape& shape = args.shape;
  const ConvolveScratch scratch(shape, Scratch(memory));
  const ConvolveRow convolve_row = convolution_of(shape);
  for (int64_t i = 0; i < kTileGroups * scratch.ring_step; ++i) {
    scratch.ring.data[i] = 0.0f;
  }
  const int64_t groups = ceil_of(shape.channels, kGroup);
  const int64_t tiles = ceil_of(shape.channels, kTile);
  const int64_t rows = ceil_of(shape.out_height, args.bands);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t index = item / tiles % args.bands;
    const int64_t first = item % tiles * kTile;
    const HiddenTile tile{
        item / tiles / args.bands,
        first,
        smaller(kTileGroups, groups - first / kGroup)};
    const int64_t stop = smaller((index + 1) * rows, shape.out_height);
    float sums[kTile] = {};
    for (int64_t y = index * rows; y < stop; y += scratch.band) {
      const Band band{y, smaller(scratch.band, stop - y)};
      const int64_t kept = y == index * rows ? 0 : shared_rows(shape);
      fill(
          args,
          scratch,
          tile,
          y * shape.stride + kept,
          band.end() * shape.stride + shared_rows(shape));
      with_nonlinearity(args.depthwise_activation, 0.0f, [&](auto act) {
        for (int64_t c = 0; c < tile.groups * kGroup; c += kVecSize) {
          convolve_band(
              args,
              scratch,
              act,
              scratch.group(c / kGroup),
              convolve_row,
              tile.sample,
              first + c,
              band,
              sums + c);
        }
      });
    }
    if (args.pooled != nullptr) {
      float* pooled = args.pooled +
                      (tile.sample * args.bands + index) * groups * kGroup +
                      first;
      for (int64_t c = 0; c < tile.groups * kGroup; c += kVecSize) {
        store(pooled + c, load(sums + c));
      }
    }
  }
}

// ---- projection ---------------------------------------------------------

struct ProjectScratch {
  float* products;  // [kStrip, kTile]
  float* weight;    // [channels, kTile], gated
  int64_t taken;

  ProjectScratch(const DepthwiseShape& shape, Scratch scratch) {
    products = scratch.take(kStrip * kTile);
    weight = scratch.take(shape.channels * kTile);
    taken = scratch.taken();
  }
};

// Some pixels of a tile of output channels.
struct OutputTile {
  int64_t sample;
  int64_t first;     // channel
  int64_t channels;  // how many
};

template <typename T>
DLKERNELS_NOINLINE void write_pixels(
    const Args& args,
    const float* products,
    const OutputTile& tile,
    int64_t pixel,
    int64_t count) {
  const int64_t channels = args.out_channels;
  const int64_t begin =
      (tile.sample * out_area_of(args.shape) + pixel) * channels + tile.first;
  T* out = static_cast<T*>(args.out) + begin;
  const T* x = static_cast<const T*>(args.x) + begin;
  const float* bias = args.project_bias + tile.first;
  for (int64_t i = 0; i < count; ++i) {
    for_each_vec(tile.channels, [&](int64_t c, auto lanes) {
      Vec value = load(products + i * kTile + c) + load(bias + c);
      if (args.has_residual) {
        value += load(x + i * channels + c, lanes);
      }
      store(out + i * channels + c, value, lanes);
    });
  }
}

template <typename T>
DLKERNELS_NOINLINE void write_planes(
    const Args& args,
    const float* products,
    const OutputTile& tile,
    int64_t pixel,
    int64_t count) {
  const int64_t area = out_area_of(args.shape);
  const int64_t plane = tile.sample * args.out_channels + tile.first;
  T* out = static_cast<T*>(args.out) + plane * area + pixel;
  const T* x = static_cast<const T*>(args.x) + plane * area + pixel;
  const float* bias = args.project_bias + tile.first;
  for (int64_t c = 0; c < tile.channels; c += kVecSize) {
    const int64_t planes = smaller(kVecSize, tile.channels - c);
    for_each_vec(count, [&](int64_t p, auto lanes) {
      Vec values[kVecSize];
      for (int64_t i = 0; i < kVecSize; ++i) {
        values[i] = load(products + (p + i) * kTile + c);
      }
      transpose(values);
      for (int64_t i = 0; i < planes; ++i) {
        const int64_t at = (c + i) * area + p;
        Vec value = values[i] + bias[c + i];
        if (args.has_residual) {
          value += load(x + at, lanes);
        }
        store(out + at, value, lanes);
      }
    });
  }
}

// The weights of a tile of outputs, with the sample's gate folded in.
const float* gated_weight(
    const Args& args, const ProjectScratch& scratch, const OutputTile& tile) {
  const int64_t channels = args.shape.channels;
  const float* weight = args.project_weight + tile.first * channels;
  if (args.gate == nullptr) {
    return weight;
  }
  const float* gate = args.gate + tile.sample * channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = c * kTile; i < (c + 1) * kTile; i += kVecSize) {
      store(scratch.weight + i, load(weight + i) * gate[c]);
    }
  }
  return scratch.weight;
}

void project(const Args& args, float* memory, int64_t begin, int64_t end) {
  const DepthwiseShape& shape = args.shape;
  const ProjectScratch scratch(shape, Scratch(memory));
  const int64_t area = out_area_of(shape);
  const int64_t step = group_step(area);
  const int64_t groups = ceil_of(shape.channels, kGroup);
  const int64_t tiles = ceil_of(args.out_channels, kTile);
  const int64_t pixels = ceil_of(area, args.parts);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / tiles % args.parts;
    const int64_t first = item % tiles * kTile;
    const OutputTile tile{
        item / tiles / args.parts,
        first,
        smaller(kTile, args.out_channels - first)};
    const float* weight = gated_weight(args, scratch, tile);
    const float* hidden = args.hidden + tile.sample * groups * step;
    const int64_t vecs = ceil_of(tile.channels, kVecSize);
    const int64_t stop = smaller((part + 1) * pixels, area);
    for (int64_t p = part * pixels; p < stop; p += kStrip) {
      const int64_t count = smaller(kStrip, stop - p);
      for (int64_t i = 0; i < count; i += kRows) {
        multiply(
            vecs,
            hidden + (p + i) * kGroup,
            step,
            shape.channels,
            weight,
            scratch.products + i * kTile);
      }
      dispatch(shape.dtype, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const auto write =
            args.channels_last ? write_pixels<T> : write_planes<T>;
        write(args, scratch.products, tile, p, count);
      });
    }
  }
}

int64_t scratch_floats(const Args& args) {
  const Scratch counter(nullptr);
  const int64_t convolving = ConvolveScratch(args.shape, counter).taken;
  const int64_t projecting = ProjectScratch(args.shape, counter).taken;
  return convolving < projecting ? projecting : convolving;
}

}  // namespace

extern const MbconvBlockKernels mbconv_block_kernels = {
    kTile,
    scratch_floats,
    pack_matrix,
    gather,
    convolve,
    project,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
