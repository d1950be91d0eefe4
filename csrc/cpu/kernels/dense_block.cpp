#include "dense_block.h"

#include <type_traits>

#include "../transpose.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

DLKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// ---- matrix product -----------------------------------------------------

// The accumulators of kMaxRows x kPanel values fill the vector registers.
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 4;
#endif
constexpr int64_t kPanel = 2 * kVecSize;

// c[row, column] (+)= sum_k a[row, k] * b[k * b_pitch + column], where element
// (row, k) of a stands at row * kPitch + k, or when transposed at
// k * kPitch + row. The sum over k is complete before it is added to c, so that
// long sums are summed in blocks.
template <int kRows, int kVecs, bool kTransposed>
void multiply_rows(
    int64_t depth,
    const float* a,
    const float* b,
    int64_t b_pitch,
    float* c,
    int64_t c_pitch,
    bool accumulate) {
  Vec total[kRows][kVecs];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      total[row][v] = Vec{};
    }
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      columns[v] = load(b + v * kVecSize);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec value = broadcast(a[kTransposed ? row : row * kPitch]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        total[row][v] += value * columns[v];
      }
    }
    a += kTransposed ? kPitch : 1;
    b += b_pitch;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* at = c + row * c_pitch + v * kVecSize;
      store(at, accumulate ? load(at) + total[row][v] : total[row][v]);
    }
  }
}

// Calls multiply_rows for a number of rows known only now.
template <int kRows, int kVecs, bool kTransposed>
DLKERNELS_INLINE void multiply_rows_of(
    int64_t rows,
    int64_t depth,
    const float* a,
    const float* b,
    int64_t b_pitch,
    float* c,
    int64_t c_pitch,
    bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_rows<kRows, kVecs, kTransposed>(
          depth, a, b, b_pitch, c, c_pitch, accumulate);
    } else {
      multiply_rows_of<kRows - 1, kVecs, kTransposed>(
          rows, depth, a, b, b_pitch, c, c_pitch, accumulate);
    }
  }
}

struct Product {
  int64_t rows;
  int64_t depth;
  int64_t columns;  // a multiple of kVecSize
  const float* a;
  const float* b;
  int64_t b_pitch;  // from row to row, or 0 where b is packed in panels
  float* c;
  int64_t c_pitch;
  bool accumulate;
};

template <bool kTransposed>
void multiply(const Product& p) {
  const int64_t groups = (p.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t column = 0; column < p.columns; column += kPanel) {
    const bool whole = p.columns - column >= kPanel;
    const bool packed = p.b_pitch == 0;
    const int64_t b_pitch = packed ? (whole ? kPanel : kVecSize) : p.b_pitch;
    const float* b = p.b + (packed ? p.depth * column : column);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * p.rows / groups;
      const int64_t rows = (group + 1) * p.rows / groups - first;
      const float* a = p.a + (kTransposed ? first : first * kPitch);
      float* c = p.c + first * p.c_pitch + column;
      if (whole) {
        multiply_rows_of<kMaxRows, 2, kTransposed>(
            rows, p.depth, a, b, b_pitch, c, p.c_pitch, p.accumulate);
      } else {
        multiply_rows_of<kMaxRows, 1, kTransposed>(
            rows, p.depth, a, b, b_pitch, c, p.c_pitch, p.accumulate);
      }
    }
  }
}

// ---- weights ------------------------------------------------------------

// Where the packed weights of one block of outputs, one block of inputs and
// one tap begin.
DLKERNELS_INLINE int64_t packed_offset(
    int64_t taps,
    int64_t inputs,
    int64_t in,
    int64_t depth,
    int64_t tap,
    int64_t out,
    int64_t columns) {
  return out * inputs * taps + (in * taps + tap * depth) * columns;
}

// Where the values of one input and one tap begin for the outputs from `out`
// on, up to the end of the panel.
DLKERNELS_INLINE int64_t packed_row(
    int64_t taps,
    int64_t inputs,
    int64_t in,
    int64_t tap,
    int64_t outputs,
    int64_t out) {
  const int64_t block = out / kBlock * kBlock;
  const int64_t columns = padded_channels(smaller(kBlock, outputs - block));
  const int64_t panel = (out - block) / kPanel * kPanel;
  const int64_t in_block = in / kBlock * kBlock;
  const int64_t depth = smaller(kBlock, inputs - in_block);
  return packed_offset(taps, inputs, in_block, depth, tap, block, columns) +
         depth * panel + (in - in_block) * smaller(kPanel, columns - panel) +
         (out - block - panel);
}

// From `size` neighbouring values of each of the outputs [begin, end), which
// lie `step` apart: squares of outputs by values, transposed. place(i) is where
// value i of the outputs from `out` on goes.
template <typename T, typename Place>
DLKERNELS_INLINE void pack_values(
    const PackArgs& args,
    const T* weight,
    int64_t size,
    int64_t begin,
    int64_t end,
    const Place& place) {
  const int64_t step = args.kernel * args.kernel * args.in;
  for (int64_t out = begin; out < end; out += kVecSize) {
    for_each_vec(size, [&](int64_t i, auto lanes) {
      Vec values[kVecSize];
      for (int64_t k = 0; k < kVecSize; ++k) {
        values[k] = out + k < args.out
                        ? load(weight + (out + k) * step + i, lanes)
                        : Vec{};
      }
      transpose(values);
      const int64_t stop = smaller(kVecSize, size - i);
      for (int64_t k = 0; k < stop; ++k) {
        store(args.packed + place(i + k, out), values[k]);
      }
    });
  }
}

// The matrix from inputs to outputs, for the outputs [begin, end).
template <int64_t kTaps, typename T>
DLKERNELS_INLINE void pack_forward(
    const PackArgs& args, const T* weight, int64_t begin, int64_t end) {
  if (!args.channels_last) {
    const auto place = [&](int64_t i, int64_t out) {
      return packed_row(kTaps, args.in, i / kTaps, i % kTaps, args.out, out);
    };
    pack_values(args, weight, args.in * kTaps, begin, end, place);
    return;
  }
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const auto place = [&](int64_t in, int64_t out) {
      return packed_row(kTaps, args.in, in, tap, args.out, out);
    };
    pack_values(args, weight + tap * args.in, args.in, begin, end, place);
  }
}

DLKERNELS_INLINE float value_of(const float* from) {
  return *from;
}

template <typename T>
DLKERNELS_INLINE float value_of(const T* from) {
  return load_one(from);
}

// The same for the transposed matrix, whose columns are the inputs.
template <int64_t kTaps, typename T>
DLKERNELS_INLINE void pack_transposed(
    const PackArgs& args, const T* weight, int64_t begin, int64_t end) {
  const int64_t stop = smaller(end, args.in);
  const int64_t to_input = args.channels_last ? 1 : kTaps;
  const int64_t to_tap = args.channels_last ? args.in : 1;
  for (int64_t out = 0; out < args.out; ++out) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const T* from =
          weight + out * args.in * kTaps + begin * to_input + tap * to_tap;
      float* to =
          args.packed + packed_row(kTaps, args.out, out, tap, args.in, begin);
      for (int64_t i = 0; i < end - begin; ++i) {
        to[i] = begin + i < stop ? value_of(from + i * to_input) : 0.0f;
      }
    }
  }
}

template <int64_t kTaps>
void pack_taps(const PackArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* weight =
        static_cast<decltype(tag)>(const_cast<void*>(args.weight));
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kChannelGroup;
      if (args.transposed) {
        for (int64_t in = first; in < first + kChannelGroup; in += kVecSize) {
          pack_transposed<kTaps>(args, weight, in, in + kVecSize);
        }
      } else {
        pack_forward<kTaps>(args, weight, first, first + kChannelGroup);
      }
    }
  });
}

void pack(const PackArgs& args, int64_t begin, int64_t end) {
  args.kernel == 1 ? pack_taps<1>(args, begin, end)
                   : pack_taps<9>(args, begin, end);
}

template <int64_t kTaps>
void unpack_taps(const UnpackArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    auto* weight = static_cast<decltype(tag)>(args.weight);
    const int64_t columns = padded_channels(args.out);
    const int64_t size = args.in * kTaps;
    const auto sum_of_threads = [&](int64_t index, int64_t out) {
      const int64_t row = index % kTaps * args.in + index / kTaps;
      const float* from = args.partial + row * columns + out;
      Vec total = load(from);
      for (int64_t thread = 1; thread < args.threads; ++thread) {
        total += load(from + thread * size * columns);
      }
      return total;
    };
    const int64_t stop = smaller(end * kChannelGroup, args.out);
    for (int64_t out = begin * kChannelGroup; out < stop; out += kVecSize) {
      const int64_t rows = smaller(kVecSize, args.out - out);
      for_each_vec(size, [&](int64_t i, auto lanes) {
        Vec values[kVecSize];
        for (int64_t k = 0; k < kVecSize; ++k) {
          values[k] = i + k < size ? sum_of_threads(i + k, out) : Vec{};
        }
        transpose(values);
        for (int64_t k = 0; k < rows; ++k) {
          store(weight + (out + k) * size + i, values[k], lanes);
        }
      });
    }
  });
}

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) {
  args.kernel == 1 ? unpack_taps<1>(args, begin, end)
                   : unpack_taps<9>(args, begin, end);
}

// ---- tiles --------------------------------------------------------------

// Successive pixels of one sample, and where the first stands in the tile.
struct Run {
  int64_t sample;
  int64_t pixel;
  int64_t count;
  int64_t position;
};

// A tile in scratch memory. With a halo, row follows row with one zero between,
// which pads the end of one and the start of the next.
struct Tile {
  Tiling tiling;
  int64_t sample;
  int64_t first;  // row of the sample, or pixel of the batch without halo
  int64_t count;  // rows, or pixels

  int64_t pitch() const {
    return tiling.grid.width + tiling.halo;
  }
  // Of the first pixel that is not in the halo.
  int64_t centre() const {
    return tiling.halo * (pitch() + 1);
  }
  // Pixels from there to the last that is not in the halo, padding included.
  int64_t span() const {
    return tiling.halo == 0 ? count : count * pitch() - 1;
  }
  int64_t length() const {
    return tiling.halo == 0 ? count : (count + 2) * pitch() + 1;
  }
  int64_t pixels() const {
    return tiling.halo == 0 ? count : count * tiling.grid.width;
  }
  // From a pixel to its neighbour under a tap of the kernel.
  int64_t tap_offset(int64_t tap) const {
    return tiling.halo == 0 ? 0 : (tap / 3 - 1) * pitch() + tap % 3 - 1;
  }
  int64_t taps() const {
    return tiling.halo == 0 ? 1 : 9;
  }
};

Tile tile_at(const Tiling& tiling, int64_t index) {
  if (tiling.halo == 0) {
    const Grid& grid = tiling.grid;
    const int64_t total = grid.samples * grid.height * grid.width;
    const int64_t first = index * tiling.size;
    return {tiling, 0, first, smaller(tiling.size, total - first)};
  }
  const int64_t first = index % tiling.bands * tiling.size;
  return {
      tiling,
      index / tiling.bands,
      first,
      smaller(tiling.size, tiling.grid.height - first)};
}

// The runs of a tile; those of the halo too if `with_halo`. Positions count
// from the start of the tile if so, else from its centre.
template <typename Body>
DLKERNELS_INLINE void for_each_run(
    const Tile& tile, bool with_halo, const Body& body) {
  const Grid& grid = tile.tiling.grid;
  if (tile.tiling.halo == 0) {
    const int64_t area = grid.height * grid.width;
    for (int64_t done = 0; done < tile.count;) {
      const int64_t sample = (tile.first + done) / area;
      const int64_t pixel = (tile.first + done) % area;
      const int64_t count = smaller(area - pixel, tile.count - done);
      body(Run{sample, pixel, count, done});
      done += count;
    }
    return;
  }
  const int64_t extra = with_halo ? 1 : 0;
  for (int64_t row = -extra; row < tile.count + extra; ++row) {
    const int64_t y = tile.first + row;
    if (y >= 0 && y < grid.height) {
      const int64_t position =
          row * tile.pitch() + (with_halo ? tile.centre() : 0);
      body(Run{tile.sample, y * grid.width, grid.width, position});
    }
  }
}

// Zeroes what no run of the tile covers: padding and rows outside the maps.
void clear_padding(const Tile& tile, float* block, int64_t channels) {
  if (tile.tiling.halo == 0) {
    return;
  }
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < channels; c += kVecSize) {
        store(block + i * kPitch + c, Vec{});
      }
    }
  };
  int64_t done = 0;
  for_each_run(tile, true, [&](const Run& run) {
    clear(done, run.position);
    done = run.position + run.count;
  });
  clear(done, tile.length());
}

// ---- maps in either layout ----------------------------------------------

// In channels_last maps a slice is a short stretch of every pixel, which the
// hardware does not see coming: lines are fetched this many pixels ahead.
constexpr int64_t kPrefetchPixels = 8;

// Calls body(pixel, channel, values, lanes) with vectors of channels for all of
// the run's pixels and for the channels [first, first + count) of the slice;
// pixel and channel count from the run's and from `first`.
template <typename T, typename Body>
DLKERNELS_INLINE void read_run(
    const Slice& slice,
    const Grid& grid,
    const Run& run,
    int64_t first,
    int64_t count,
    const Body& body) {
  const T* data = static_cast<const T*>(slice.data);
  const int64_t area = grid.height * grid.width;
  const int64_t channel = slice.first + first;
  if (slice.channels_last) {
    data += (run.sample * area + run.pixel) * slice.channels + channel;
    for (int64_t i = 0; i < run.count; ++i) {
      const T* pixel = data + i * slice.channels;
      const T* ahead = pixel + kPrefetchPixels * slice.channels;
      for_each_vec(count, [&](int64_t c, auto lanes) {
        __builtin_prefetch(ahead + c);
        body(i, c, load(pixel + c, lanes), lanes);
      });
    }
    return;
  }
  data += (run.sample * slice.channels + channel) * area + run.pixel;
  for_each_vec(count, [&](int64_t c, auto lanes) {
    const int64_t rows = smaller(kVecSize, count - c);
    for_each_vec(run.count, [&](int64_t i, auto pixels) {
      Vec values[kVecSize];
      for (int64_t k = 0; k < kVecSize; ++k) {
        values[k] = k < rows ? load(data + (c + k) * area + i, pixels) : Vec{};
      }
      transpose(values);
      const int64_t stop = smaller(kVecSize, run.count - i);
      for (int64_t k = 0; k < stop; ++k) {
        body(i + k, c, values[k], lanes);
      }
    });
  });
}

// The reverse: writes the vectors of channels that value(pixel, channel, lanes)
// returns.
template <typename T, typename Value>
DLKERNELS_INLINE void write_run(
    const Slice& slice,
    const Grid& grid,
    const Run& run,
    int64_t first,
    int64_t count,
    const Value& value) {
  T* data = static_cast<T*>(slice.data);
  const int64_t area = grid.height * grid.width;
  const int64_t channel = slice.first + first;
  if (slice.channels_last) {
    data += (run.sample * area + run.pixel) * slice.channels + channel;
    for (int64_t i = 0; i < run.count; ++i) {
      T* pixel = data + i * slice.channels;
      const T* ahead = pixel + kPrefetchPixels * slice.channels;
      for_each_vec(count, [&](int64_t c, auto lanes) {
        __builtin_prefetch(ahead + c, 1);
        store(pixel + c, value(i, c, lanes), lanes);
      });
    }
    return;
  }
  data += (run.sample * slice.channels + channel) * area + run.pixel;
  for_each_vec(count, [&](int64_t c, auto lanes) {
    const int64_t rows = smaller(kVecSize, count - c);
    for_each_vec(run.count, [&](int64_t i, auto pixels) {
      Vec values[kVecSize];
      const int64_t stop = smaller(kVecSize, run.count - i);
      for (int64_t k = 0; k < kVecSize; ++k) {
        values[k] = k < stop ? value(i + k, c, lanes) : Vec{};
      }
      transpose(values);
      for (int64_t k = 0; k < rows; ++k) {
        store(data + (c + k) * area + i, values[k], pixels);
      }
    });
  });
}

// Multiplies a block of a tile by what dropout kept.
void apply_dropout(
    const Dropout& dropout,
    int64_t channels,
    const Tile& tile,
    bool with_halo,
    float* block,
    int64_t first,
    int64_t count) {
  if (dropout.kept == nullptr) {
    return;
  }
  const int64_t area = tile.tiling.grid.height * tile.tiling.grid.width;
  for_each_run(tile, with_halo, [&](const Run& run) {
    const int64_t pixel = run.sample * area + run.pixel;
    const uint8_t* kept = dropout.kept + pixel * channels + first;
    for (int64_t i = 0; i < run.count; ++i) {
      float* values = block + (run.position + i) * kPitch;
      for (int64_t c = 0; c < count; ++c) {
        values[c] *= kept[i * channels + c] ? dropout.scale : 0.0f;
      }
    }
  });
}

template <typename Lanes>
DLKERNELS_INLINE Vec
apply(const Affine& affine, int64_t channel, Vec x, Lanes lanes) {
  return (x - load(affine.mean + channel, lanes)) *
             load(affine.scale + channel, lanes) +
         load(affine.shift + channel, lanes);
}

// ---- passes -------------------------------------------------------------

// Fills a block with relu(norm(x)) of the tile and its halo, and `raw`, where
// given, with x.
void load_normalised(
    const Slice& in,
    const Affine& norm,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block,
    float* raw) {
  dispatch(in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_run(tile, true, [&](const Run& run) {
      float* to = block + run.position * kPitch;
      float* raw_to = raw + run.position * kPitch;
      read_run<T>(
          in,
          tile.tiling.grid,
          run,
          first,
          count,
          [&](int64_t i, int64_t c, Vec x, auto lanes) {
            const Vec z = apply(norm, first + c, x, lanes);
            store(to + i * kPitch + c, maximum(z, Vec{}));
            if (raw != nullptr) {
              store(raw_to + i * kPitch + c, x);
            }
          });
    });
  });
  clear_padding(tile, block, count);
}

// Fills a block with grad_out + correction(out) of the tile and its halo.
void load_gradient(
    const Slice& grad_out,
    const Slice& out,
    const Affine& correction,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  const Grid& grid = tile.tiling.grid;
  for_each_run(tile, true, [&](const Run& run) {
    float* to = block + run.position * kPitch;
    dispatch(grad_out.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      read_run<T>(
          grad_out,
          grid,
          run,
          first,
          count,
          [&](int64_t i, int64_t c, Vec grad, auto) {
            store(to + i * kPitch + c, grad);
          });
    });
    if (correction.mean == nullptr) {
      return;
    }
    dispatch(out.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      read_run<T>(
          out,
          grid,
          run,
          first,
          count,
          [&](int64_t i, int64_t c, Vec x, auto lanes) {
            float* grad = to + i * kPitch + c;
            store(grad, load(grad) + apply(correction, first + c, x, lanes));
          });
    });
  });
  clear_padding(tile, block, count);
}

// Mean and sum of squared deviations of each channel of a block.
void block_moments(
    const Tile& tile,
    const float* block,
    int64_t count,
    float* means,
    float* squares) {
  const float pixels = static_cast<float>(tile.pixels());
  const auto sum_over = [&](int64_t c, const auto& term) {
    Vec total{};
    for_each_run(tile, false, [&](const Run& run) {
      const float* at = block + run.position * kPitch + c;
      Vec sums[4] = {};
      int64_t i = 0;
      for (; i + 4 <= run.count; i += 4) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; ++k) {
          sums[k] += term(load(at + (i + k) * kPitch));
        }
      }
      for (; i < run.count; ++i) {
        sums[0] += term(load(at + i * kPitch));
      }
      total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    });
    return total;
  };
  for_each_vec(count, [&](int64_t c, auto lanes) {
    const Vec mean = sum_over(c, [](Vec x) { return x; }) / pixels;
    store(means + c, mean, lanes);
    const Vec square =
        sum_over(c, [&](Vec x) { return (x - mean) * (x - mean); });
    store(squares + c, square, lanes);
  });
}

// Writes a block of results to the slice, and leaves them in the block as they
// were rounded.
void write_block(
    const Slice& out,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  dispatch(out.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_run(tile, false, [&](const Run& run) {
      float* from = block + run.position * kPitch;
      write_run<T>(
          out,
          tile.tiling.grid,
          run,
          first,
          count,
          [&](int64_t i, int64_t c, auto) {
            float* value = from + i * kPitch + c;
            if constexpr (!std::is_same_v<T, float>) {
              store(value, widen(narrow(load(value), T{}), T{}));
            }
            return load(value);
          });
    });
  });
}

// Mean and sum of squared deviations of each channel of a block.
void keep_moments(
    const Tile& tile,
    const float* block,
    int64_t index,
    int64_t channels,
    int64_t first,
    int64_t count,
    float* moments) {
  if (moments == nullptr) {
    return;
  }
  float* means = moments + index * 2 * channels + first;
  block_moments(tile, block, count, means, means + channels);
}

void conv(const ConvArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t length = tile_length(args.tiling);
  float* activated = scratch;
  float* results = scratch + length * kPitch;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    for (int64_t in = 0; in < args.in.count; in += kBlock) {
      const int64_t depth = smaller(kBlock, args.in.count - in);
      load_normalised(args.in, args.norm, tile, in, depth, activated, nullptr);
      for (int64_t out = 0; out < args.out.count; out += kBlock) {
        const int64_t columns =
            padded_channels(smaller(kBlock, args.out.count - out));
        for (int64_t tap = 0; tap < tile.taps(); ++tap) {
          const float* weight =
              args.weight +
              packed_offset(
                  tile.taps(), args.in.count, in, depth, tap, out, columns);
          multiply<false>(
              {tile.span(),
               depth,
               columns,
               activated + (tile.centre() + tile.tap_offset(tap)) * kPitch,
               weight,
               0,
               results + out / kBlock * length * kPitch,
               kPitch,
               in > 0 || tap > 0});
        }
      }
    }
    for (int64_t out = 0; out < args.out.count; out += kBlock) {
      const int64_t count = smaller(kBlock, args.out.count - out);
      float* block = results + out / kBlock * length * kPitch;
      apply_dropout(
          args.dropout, args.out.count, tile, false, block, out, count);
      write_block(args.out, tile, out, count, block);
      keep_moments(
          tile, block, index, args.out.count, out, count, args.moments);
    }
  }
}

// From the gradient of relu(norm(x)): grad_z, its sums and grad_in.
void finish_backward(
    const ConvBackwardArgs& args,
    const Tile& tile,
    int64_t first,
    int64_t count,
    const float* grad_activated,
    const float* activated,
    const float* raw,
    float* sums) {
  const Grid& grid = tile.tiling.grid;
  Vec totals[2][kBlock / kVecSize + 1] = {};
  for_each_run(tile, false, [&](const Run& run) {
    const int64_t centre = tile.centre() + run.position;
    const auto grad_of = [&](int64_t i, int64_t c, auto lanes) {
      const int64_t at = (centre + i) * kPitch + c;
      const Vec grad = load(grad_activated + (run.position + i) * kPitch + c);
      const Vec grad_z = load(activated + at) <= 0.0f ? Vec{} : grad;
      const Vec centred =
          load(raw + at) - load(args.norm.mean + first + c, lanes);
      totals[0][c / kVecSize] += grad_z;
      totals[1][c / kVecSize] += grad_z * centred;
      return grad_z * load(args.norm.scale + first + c, lanes);
    };
    const int64_t pixel = run.sample * grid.height * grid.width + run.pixel;
    float* grad_in = args.grad_in + pixel * args.grad_in_channels + first;
    const auto write = [&](int64_t i, int64_t c, Vec before, auto lanes) {
      float* to = grad_in + i * args.grad_in_channels + c;
      store(to, before + grad_of(i, c, lanes), lanes);
    };
    if (args.grad_before.data == nullptr) {
      for (int64_t i = 0; i < run.count; ++i) {
        for_each_vec(
            count, [&](int64_t c, auto lanes) { write(i, c, Vec{}, lanes); });
      }
      return;
    }
    dispatch(args.grad_before.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      read_run<T>(args.grad_before, grid, run, first, count, write);
    });
  });
  for_each_vec(count, [&](int64_t c, auto lanes) {
    for (int64_t k = 0; k < 2; ++k) {
      float* at = sums + k * args.in.count + first + c;
      store(at, load(at, lanes) + totals[k][c / kVecSize], lanes);
    }
  });
}

void conv_backward(
    const ConvBackwardArgs& args,
    const ConvGradients& gradients,
    float* scratch,
    int64_t begin,
    int64_t end) {
  const int64_t block_size = tile_length(args.tiling) * kPitch;
  const int64_t inputs = args.in.count;
  const int64_t outputs = args.grad_out.count;
  const int64_t padded_outputs = padded_channels(outputs);
  float* activated = scratch;
  float* raw = scratch + block_size;
  float* grad_activated = scratch + 2 * block_size;
  float* grad = scratch + 3 * block_size;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    const int64_t taps = tile.taps();
    for (int64_t out = 0; out < outputs; out += kBlock) {
      const int64_t count = smaller(kBlock, outputs - out);
      float* block = grad + out / kBlock * block_size;
      load_gradient(
          args.grad_out, args.out, args.correction, tile, out, count, block);
      apply_dropout(args.dropout, outputs, tile, true, block, out, count);
    }
    for (int64_t in = 0; in < inputs; in += kBlock) {
      const int64_t width = smaller(kBlock, inputs - in);
      const int64_t columns = padded_channels(width);
      load_normalised(args.in, args.norm, tile, in, width, activated, raw);
      for (int64_t out = 0; out < outputs; out += kBlock) {
        const int64_t depth = smaller(kBlock, outputs - out);
        const float* block = grad + out / kBlock * block_size;
        const float* centre = block + tile.centre() * kPitch;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t offset = tile.tap_offset(tap) * kPitch;
          multiply<true>(
              {width,
               tile.span(),
               padded_channels(depth),
               activated + tile.centre() * kPitch + offset,
               centre,
               kPitch,
               gradients.weight + (tap * inputs + in) * padded_outputs + out,
               padded_outputs,
               true});
          const float* weight =
              args.weight +
              packed_offset(taps, outputs, out, depth, tap, in, columns);
          multiply<false>(
              {tile.span(),
               depth,
               columns,
               centre - offset,
               weight,
               0,
               grad_activated,
               kPitch,
               out > 0 || tap > 0});
        }
      }
      finish_backward(
          args,
          tile,
          in,
          width,
          grad_activated,
          activated,
          raw,
          gradients.sums);
    }
  }
}

void copy(const CopyArgs& args, float* scratch, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    for (int64_t first = 0; first < args.out.count; first += kBlock) {
      const int64_t count = smaller(kBlock, args.out.count - first);
      load_gradient(
          args.in, args.values, args.correction, tile, first, count, scratch);
      write_block(args.out, tile, first, count, scratch);
      keep_moments(
          tile, scratch, index, args.out.count, first, count, args.moments);
    }
  }
}

void moments(
    const MomentsArgs& args, float* scratch, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    for (int64_t first = 0; first < args.in.count; first += kBlock) {
      const int64_t count = smaller(kBlock, args.in.count - first);
      load_gradient(args.in, {}, {}, tile, first, count, scratch);
      keep_moments(
          tile, scratch, index, args.in.count, first, count, args.moments);
    }
  }
}

// ---- transition ---------------------------------------------------------

// Rows [row, row + rows) of one sample, as a tile without halo.
Tile rows_of(const Grid& grid, int64_t sample, int64_t row, int64_t rows) {
  const int64_t first = (sample * grid.height + row) * grid.width;
  return {{grid, 0, 0, 0, 0}, 0, first, rows * grid.width};
}

Grid pooled_grid(const Grid& grid) {
  return {grid.samples, grid.height / 2, grid.width / 2};
}

void pool(const PoolArgs& args, float* scratch, int64_t begin, int64_t end) {
  const Grid& grid = args.grid;
  const Grid pooled = pooled_grid(grid);
  float* results = scratch + 2 * grid.width * kPitch;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / pooled.height;
    const int64_t row = item % pooled.height;
    const Tile tile = rows_of(grid, sample, 2 * row, 2);
    const Tile result_tile = rows_of(pooled, sample, row, 1);
    for (int64_t first = 0; first < args.in.count; first += kBlock) {
      const int64_t count = smaller(kBlock, args.in.count - first);
      load_normalised(args.in, args.norm, tile, first, count, scratch, nullptr);
      for (int64_t i = 0; i < pooled.width; ++i) {
        const float* upper = scratch + 2 * i * kPitch;
        const float* lower = upper + grid.width * kPitch;
        for (int64_t c = 0; c < count; c += kVecSize) {
          const Vec total = (load(upper + c) + load(upper + kPitch + c)) +
                            (load(lower + c) + load(lower + kPitch + c));
          store(results + i * kPitch + c, total * 0.25f);
        }
      }
      write_block(args.out, result_tile, first, count, results);
    }
  }
}

// Turns relu(norm(x)) of up to two rows into the gradient of norm(x).
void pool_gradient(
    int64_t width,
    int64_t rows,
    int64_t count,
    const float* grad_out,
    float* activated) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      float* at = activated + (row * width + i) * kPitch;
      const bool dropped = rows < 2 || i / 2 >= width / 2;
      for (int64_t c = 0; c < count; c += kVecSize) {
        const Vec grad =
            dropped ? Vec{} : load(grad_out + i / 2 * kPitch + c) * 0.25f;
        store(at + c, load(at + c) <= 0.0f ? Vec{} : grad);
      }
    }
  }
}

void pool_backward(
    const PoolBackwardArgs& args,
    float* sums,
    float* scratch,
    int64_t begin,
    int64_t end) {
  const Grid& grid = args.grid;
  const Grid pooled = pooled_grid(grid);
  const int64_t pairs = (grid.height + 1) / 2;
  float* raw = scratch + 2 * grid.width * kPitch;
  float* grad_out = scratch + 4 * grid.width * kPitch;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / pairs;
    const int64_t row = item % pairs;
    const int64_t rows = smaller(2, grid.height - 2 * row);
    const Tile tile = rows_of(grid, sample, 2 * row, rows);
    for (int64_t first = 0; first < args.in.count; first += kBlock) {
      const int64_t count = smaller(kBlock, args.in.count - first);
      load_normalised(args.in, args.norm, tile, first, count, scratch, raw);
      if (rows == 2) {
        const Tile result_tile = rows_of(pooled, sample, row, 1);
        load_gradient(
            args.grad_out, {}, {}, result_tile, first, count, grad_out);
      }
      pool_gradient(grid.width, rows, count, grad_out, scratch);
      for_each_vec(count, [&](int64_t c, auto lanes) {
        const Vec mean = load(args.norm.mean + first + c, lanes);
        const Vec scale = load(args.norm.scale + first + c, lanes);
        Vec total{}, product{};
        for (int64_t i = 0; i < tile.count; ++i) {
          float* grad = scratch + i * kPitch + c;
          const Vec x = load(raw + i * kPitch + c);
          const Vec grad_z = load(grad);
          total += grad_z;
          product += grad_z * (x - mean);
          Vec grad_x = grad_z * scale;
          if (args.correction.mean != nullptr) {
            grad_x += apply(args.correction, first + c, x, lanes);
          }
          store(grad, grad_x);
        }
        if (sums != nullptr) {
          float* at = sums + first + c;
          store(at, load(at, lanes) + total, lanes);
          at += args.in.count;
          store(at, load(at, lanes) + product, lanes);
        }
      });
      if (args.grad_in.data != nullptr) {
        write_block(args.grad_in, tile, first, count, scratch);
      }
    }
  }
}

}  // namespace

extern const DenseBlockKernels dense_block_kernels = {
    pack,
    unpack,
    conv,
    conv_backward,
    copy,
    moments,
    pool,
    pool_backward,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
