#pragma once

// Winograd's minimal filtering F(2x2, 3x3) of 3x3 convolutions: the transforms
// of kernels, inputs and outputs, and the products between them. The formula
// stands in kernels/conv3x3.h.

#include <type_traits>

#include "kernels/conv3x3.h"
#include "panel.h"
#include "transpose.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

// Accumulators of kTileRows tiles by kPanel channels fill the registers, or in
// the gradient of the weight those of kChannelRows input channels, of which a
// slice holds a whole number, and whole vectors.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
constexpr int kChannelRows = 8;
constexpr int64_t kSlice = 16;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
constexpr int kChannelRows = 6;
constexpr int64_t kSlice = 24;
#else
constexpr int kTileRows = 4;
constexpr int kChannelRows = 4;
constexpr int64_t kSlice = 4;
#endif

// Terms that are summed in registers, of the input channels and of the tiles:
// their panel stays in the first-level cache, and long sums are summed in
// blocks.
constexpr int64_t kChannelTerms = 128;
constexpr int64_t kTileTerms = 64;

// Tiles of a row of tiles that are transformed together, in the first-level
// cache.
constexpr int64_t kMaxRun = 32;

// ---- product ------------------------------------------------------------

template <int kVecs>
DLKERNELS_NOINLINE void multiply_tiles(
    int64_t depth,
    const float* tiles,
    int64_t pitch,
    const float* weight,
    float* to,
    int64_t to_pitch,
    bool accumulate) {
  multiply_panel<kTileRows, kVecs>(
      depth, tiles, pitch, 1, weight, kPanel, to, to_pitch, accumulate);
}

// For fewer tiles.
template <int kVecs>
DLKERNELS_NOINLINE void multiply_few_tiles(
    int64_t depth,
    const float* tiles,
    int64_t pitch,
    const float* weight,
    float* to,
    int64_t to_pitch,
    bool accumulate) {
  multiply_panel<kChannelRows, kVecs>(
      depth, tiles, pitch, 1, weight, kPanel, to, to_pitch, accumulate);
}

// Sums over tiles, for some channels of a slice.
template <int kVecs>
DLKERNELS_NOINLINE void multiply_channels(
    int64_t tiles,
    const float* slice,
    const float* panel,
    float* to,
    bool accumulate) {
  multiply_panel<kChannelRows, kVecs>(
      tiles, slice, 1, kSlice, panel, kPanel, to, kPanel, accumulate);
}

// ---- weights ------------------------------------------------------------

// G g of one line of taps: three become four elements, `step` apart.
DLKERNELS_INLINE void transform_taps(Vec a, Vec b, Vec c, Vec* to, int step) {
  const Vec outer = (a + c) * 0.5f;
  const Vec inner = b * 0.5f;
  to[0] = a;
  to[step] = outer + inner;
  to[2 * step] = outer - inner;
  to[3 * step] = c;
}

DLKERNELS_INLINE void transform_kernel(
    const Vec (&taps)[9], Vec (&elements)[kElements]) {
  Vec lines[12];
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) {
    transform_taps(taps[x], taps[3 + x], taps[6 + x], lines + x, 3);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    const Vec* line = lines + 3 * y;
    transform_taps(line[0], line[1], line[2], elements + 4 * y, 1);
  }
}

// G^T u of one line of elements, `step` apart: four become three taps.
DLKERNELS_INLINE void gather_taps(const Vec* from, int step, Vec* to) {
  const Vec sum = (from[step] + from[2 * step]) * 0.5f;
  to[0] = from[0] + sum;
  to[1] = (from[step] - from[2 * step]) * 0.5f;
  to[2] = sum + from[3 * step];
}

DLKERNELS_INLINE void gather_kernel(
    const Vec (&elements)[kElements], Vec (&taps)[9]) {
  Vec lines[4][3];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    gather_taps(elements + x, 4, lines[x]);
  }
#pragma GCC unroll 3
  for (int y = 0; y < 3; ++y) {
    const Vec line[4] = {lines[0][y], lines[1][y], lines[2][y], lines[3][y]};
    gather_taps(line, 1, taps + 3 * y);
  }
}

// The kernels from kVecSize input channels to as many output channels.
using Square = Vec[9][kVecSize];

// square[tap][in], vectors of outputs, from the weight [outputs, inputs, 3, 3].
// What lies outside the weight becomes zero.
template <typename T>
static void load_square(
    const PackConv3x3Args& args,
    int64_t inputs,
    int64_t outputs,
    int64_t in,
    int64_t out,
    Square& square) {
  const T* weight = static_cast<const T*>(args.weight) + out * inputs * 9;
  const int64_t ins = smaller(kVecSize, inputs - in);
  const auto load_transposed =
      [&](int64_t at, auto lanes, Vec(&values)[kVecSize]) {
        for (int64_t i = 0; i < kVecSize; ++i) {
          values[i] = out + i < outputs
                          ? load(weight + i * inputs * 9 + at, lanes)
                          : Vec{};
        }
        transpose(values);
      };
  if (args.channels_last) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      load_transposed(tap * inputs + in, ins, square[tap]);
    }
    return;
  }
  for_each_vec(9 * ins, [&](int64_t i, auto lanes) {
    Vec values[kVecSize];
    load_transposed(9 * in + i, lanes, values);
    for (int64_t k = 0; k < kVecSize && i + k < 9 * ins; ++k) {
      square[(i + k) % 9][(i + k) / 9] = values[k];
    }
  });
}

// The convolution's input channels are the weight's outputs if it is turned.
template <typename T>
static void pack_square(const PackConv3x3Args& args, int64_t in, int64_t out) {
  Square square;
  if (args.turned) {
    load_square<T>(args, args.out_channels, args.in_channels, out, in, square);
    for (auto& values : square) {
      transpose(values);
    }
  } else {
    load_square<T>(args, args.in_channels, args.out_channels, in, out, square);
  }
  float* to = args.packed + out % kPanel +
              out / kPanel * kPanel * kElements * args.in_channels;
  const int64_t ins = smaller(kVecSize, args.in_channels - in);
  for (int64_t i = 0; i < ins; ++i) {
    Vec taps[9], elements[kElements];
    for (int tap = 0; tap < 9; ++tap) {
      taps[tap] = square[args.turned ? 8 - tap : tap][i];
    }
    transform_kernel(taps, elements);
    for (int64_t e = 0; e < kElements; ++e) {
      store(to + (e * args.in_channels + in + i) * kPanel, elements[e]);
    }
  }
}

// The kernels to the output channels [begin, end), of whole vectors.
DLKERNELS_INLINE void pack_kernels(
    const PackConv3x3Args& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t out = begin; out < end; out += kVecSize) {
      for (int64_t in = 0; in < args.in_channels; in += kVecSize) {
        pack_square<T>(args, in, out);
      }
    }
  });
}

// Gradients of kernels from those of their elements, of which there are
// `copies` to be summed: `ins` input channels, at most kVecSize, and `outs`
// output channels. `from` and `to` point to the first of them.
template <typename T>
static void unpack_square(
    const float* from,
    int64_t element_step,
    int64_t copies,
    int64_t copy_step,
    int64_t ins,
    int64_t outs,
    T* to,
    int64_t out_step) {
  Vec kernels[kVecSize][9] = {};
  for (int64_t i = 0; i < ins; ++i) {
    Vec elements[kElements];
    for (int64_t e = 0; e < kElements; ++e) {
      const float* at = from + e * element_step + i * kPanel;
      elements[e] = load(at);
      for (int64_t copy = 1; copy < copies; ++copy) {
        elements[e] += load(at + copy * copy_step);
      }
    }
    gather_kernel(elements, kernels[i]);
  }
  for_each_vec(9 * ins, [&](int64_t first, auto lanes) {
    Vec values[kVecSize];
    for (int64_t i = 0; i < kVecSize; ++i) {
      values[i] = kernels[(first + i) / 9][(first + i) % 9];
    }
    transpose(values);
    for (int64_t i = 0; i < outs; ++i) {
      store(to + i * out_step + first, values[i], lanes);
    }
  });
}

// ---- tiles --------------------------------------------------------------

// Transformed tiles, [kElements, groups, room, width]: the channels of a tile
// lie in groups of `width`.
struct Elements {
  float* data;
  int64_t room;  // for tiles
  int64_t width;
  int64_t groups;

  // From element to element.
  DLKERNELS_MEMBER int64_t step() const {
    return groups * room * width;
  }
  DLKERNELS_MEMBER int64_t size() const {
    return kElements * step();
  }
  // Where a channel's group begins, and the channel in it.
  DLKERNELS_MEMBER int64_t offset(int64_t channel) const {
    return channel / width * room * width + channel % width;
  }
};

DLKERNELS_INLINE Elements
elements_of(float* data, int64_t room, int64_t channels, int64_t width) {
  return {data, room, width, (channels + width - 1) / width};
}

// Tiles as rows of channels. They are a little longer than that: rows a power
// of two apart compete for places in a cache.
DLKERNELS_INLINE Elements
row_elements(float* data, int64_t room, int64_t channels) {
  return elements_of(data, room, channels, rounded_up(channels, kPanel) + 16);
}

// Where the transformed inputs and outputs of the gradient of a weight lie.
DLKERNELS_INLINE Elements
slice_elements(float* data, int64_t room, int64_t channels) {
  return elements_of(data, room, channels, kSlice);
}

DLKERNELS_INLINE Elements
panel_elements(float* data, int64_t room, int64_t channels) {
  return elements_of(data, room, channels, kPanel);
}

// to[e][tile] = the product of input[e][tile], `depth` channels of it, with
// the elements e of a packed weight of `inputs` channels, from its first panel
// on.
static void multiply_elements(
    const Elements& input,
    int64_t tiles,
    int64_t depth,
    const float* weight,
    int64_t inputs,
    int64_t columns,
    const Elements& to) {
  for (int64_t e = 0; e < kElements; ++e) {
    const float* from = input.data + e * input.step();
    float* products = to.data + e * to.step();
    for (int64_t k = 0; k < depth; k += kChannelTerms) {
      const int64_t count = smaller(kChannelTerms, depth - k);
      for (int64_t column = 0; column < columns; column += kPanel) {
        const bool whole = columns - column > kVecSize;
        const auto multiply_many =
            whole ? multiply_tiles<2> : multiply_tiles<1>;
        const auto multiply_few =
            whole ? multiply_few_tiles<2> : multiply_few_tiles<1>;
        const float* panel =
            weight + (column * kElements + e * kPanel) * inputs + k * kPanel;
        for (int64_t tile = 0; tile < tiles;) {
          const int64_t rest = tiles - tile;
          const bool few = rest <= kChannelRows ||
                           (rest > kTileRows && rest <= 2 * kChannelRows);
          const auto multiply = few ? multiply_few : multiply_many;
          multiply(
              count,
              from + tile * input.width + k,
              input.width,
              panel,
              products + tile * to.width + column,
              to.width,
              k > 0);
          tile += few ? kChannelRows : kTileRows;
        }
      }
    }
  }
}

// total[input channel, output channel] (+)= the sum over tiles of the products
// of element e, for the output channels of one panel, of which there are
// `columns` from there on.
DLKERNELS_INLINE void multiply_gradients(
    const Elements& input,
    const Elements& output,
    int64_t e,
    int64_t panel,
    int64_t columns,
    int64_t tiles,
    int64_t rows,
    float* total,
    bool accumulate) {
  const float* slices = input.data + e * input.step();
  const float* outputs =
      output.data + e * output.step() + panel * output.room * kPanel;
  const auto multiply =
      columns > kVecSize ? multiply_channels<2> : multiply_channels<1>;
  for (int64_t tile = 0; tile < tiles; tile += kTileTerms) {
    for (int64_t row = 0; row < rows; row += kChannelRows) {
      multiply(
          smaller(kTileTerms, tiles - tile),
          slices + input.offset(row) + tile * kSlice,
          outputs + tile * kPanel,
          total + row * kPanel,
          accumulate || tile > 0);
    }
  }
}

// B^T d B of the inputs d.
struct InputTransform {
  static constexpr int kRows = 4;     // that a tile reads
  static constexpr int kOverlap = 2;  // columns shared with the next tile

  static DLKERNELS_MEMBER void column(
      const Vec (&values)[kRows], Vec (&elements)[4]) {
    elements[0] = values[0] - values[2];
    elements[1] = values[1] + values[2];
    elements[2] = values[2] - values[1];
    elements[3] = values[1] - values[3];
  }
};

// A y A^T of the gradients y of the outputs.
struct OutputTransform {
  static constexpr int kRows = 2;
  static constexpr int kOverlap = 0;

  static DLKERNELS_MEMBER void column(
      const Vec (&values)[kRows], Vec (&elements)[4]) {
    elements[0] = values[0];
    elements[1] = values[0] + values[1];
    elements[2] = values[0] - values[1];
    elements[3] = -values[1];
  }
};

// The rows that a run reads, from its first column on; those outside the maps
// are null.
template <typename T, int kRows>
struct Window {
  const T* rows[kRows];
  int64_t begin;  // of the columns inside the maps
  int64_t end;
  int64_t columns;
};

// Four rows of pixels with a vector of channels each: the columns of a run,
// transformed.
struct Strip {
  float data[4 * (2 * kMaxRun + 2) * kVecSize];

  DLKERNELS_MEMBER float* at(int64_t row, int64_t column) {
    return data + (row * (2 * kMaxRun + 2) + column) * kVecSize;
  }
};

template <typename Transform, typename T, typename Lanes>
DLKERNELS_INLINE void transform_pixels(
    const Window<T, Transform::kRows>& window,
    int64_t channels,
    Lanes lanes,
    Strip& strip) {
  for (int64_t x = window.begin; x < window.end; ++x) {
    Vec values[Transform::kRows], elements[4];
#pragma GCC unroll 4
    for (int i = 0; i < Transform::kRows; ++i) {
      const T* row = window.rows[i];
      values[i] = row ? load(row + x * channels, lanes) : Vec{};
    }
    Transform::column(values, elements);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(strip.at(i, x), elements[i]);
    }
  }
}

// The rest of the transform, along the rows of a strip: `count` tiles from
// `first` on.
template <typename Transform>
DLKERNELS_INLINE void transform_rows(
    Strip& strip,
    const Elements& to,
    int64_t first,
    int64_t count,
    int64_t channel) {
  for (int64_t i = 0; i < 4; ++i) {
    const float* row = strip.at(i, 0);
    float* at =
        to.data + 4 * i * to.step() + to.offset(channel) + first * to.width;
    for (int64_t tile = 0; tile < count; ++tile) {
      Vec values[Transform::kRows], elements[4];
#pragma GCC unroll 4
      for (int k = 0; k < Transform::kRows; ++k) {
        values[k] = load(row + k * kVecSize);
      }
      Transform::column(values, elements);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        store(at + k * to.step(), elements[k]);
      }
      row += 2 * kVecSize;
      at += to.width;
    }
  }
}

DLKERNELS_INLINE void clear_columns(Strip& strip, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t x = begin; x < end; ++x) {
      store(strip.at(i, x), Vec{});
    }
  }
}

// A^T m A + bias of one tile.
DLKERNELS_INLINE void transform_products(
    const float* from, int64_t step, Vec bias, Vec (&outputs)[2][2]) {
  Vec lines[2][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const auto at = [&](int y) { return load(from + (4 * y + x) * step); };
    const Vec b = at(1), c = at(2);
    lines[0][x] = at(0) + b + c;
    lines[1][x] = b - c - at(3);
  }
#pragma GCC unroll 2
  for (int y = 0; y < 2; ++y) {
    const Vec* line = lines[y];
    outputs[y][0] = line[0] + line[1] + line[2] + bias;
    outputs[y][1] = line[1] - line[2] - line[3] + bias;
  }
}

// The outputs of a run, some channels of them.
template <typename T>
struct Outputs {
  T* data;
  int64_t rows;  // of the run that lie in the maps
  int64_t columns;
  int64_t row_step;
};

// put(at, value, lanes) writes a vector of channels of a pixel; pixels lie
// `channels` apart.
template <typename T, typename Lanes, typename Put>
DLKERNELS_INLINE void write_pixels(
    const Outputs<T>& to,
    int64_t channels,
    const Elements& products,
    const float* from,
    Vec bias,
    Lanes lanes,
    const Put& put) {
  for (int64_t x = 0; x < to.columns; x += 2) {
    Vec values[2][2];
    transform_products(from, products.step(), bias, values);
    for (int64_t y = 0; y < to.rows; ++y) {
      T* at = to.data + y * to.row_step + x * channels;
      put(at, values[y][0], lanes);
      if (x + 1 < to.columns) {
        put(at + channels, values[y][1], lanes);
      }
    }
    from += products.width;
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
