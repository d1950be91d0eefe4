#pragma once

// Tiles of maps in scratch memory: read from maps of either layout, multiplied
// by matrices, and written back.

#include <type_traits>

#include "panel.h"
#include "tiling.h"
#include "transpose.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

// ---- matrix product -----------------------------------------------------

// The accumulators of kMaxRows x kPanel values fill the vector registers.
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 4;
#endif

// c[row, column] (+)= sum_k a[row, k] * b[k * b_pitch + column], where element
// (row, k) of a stands at row * kPitch + k, or when transposed at
// k * kPitch + row.
template <int kRows, int kVecs, bool kTransposed>
DLKERNELS_NOINLINE void multiply_rows(
    int64_t depth,
    const float* a,
    const float* b,
    int64_t b_pitch,
    float* c,
    int64_t c_pitch,
    bool accumulate) {
  multiply_panel<kRows, kVecs>(
      depth,
      a,
      kTransposed ? 1 : kPitch,
      kTransposed ? kPitch : 1,
      b,
      b_pitch,
      c,
      c_pitch,
      accumulate);
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
DLKERNELS_NOINLINE void multiply(const Product& p) {
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

// Where the packed weights of a block of outputs and a block of inputs begin.
DLKERNELS_INLINE int64_t
packed_offset(int64_t inputs, int64_t in, int64_t out, int64_t columns) {
  return out * inputs + in * columns;
}

// Where the values of one input begin for the outputs from `out` on, up to the
// end of the panel.
DLKERNELS_INLINE int64_t
packed_row(int64_t inputs, int64_t in, int64_t outputs, int64_t out) {
  const int64_t block = out / kBlock * kBlock;
  const int64_t columns = padded_channels(smaller(kBlock, outputs - block));
  const int64_t panel = (out - block) / kPanel * kPanel;
  const int64_t in_block = in / kBlock * kBlock;
  const int64_t depth = smaller(kBlock, inputs - in_block);
  return packed_offset(inputs, in_block, block, columns) + depth * panel +
         (in - in_block) * smaller(kPanel, columns - panel) +
         (out - block - panel);
}

// The matrix from inputs to outputs, for the outputs [begin, end): squares,
// transposed.
template <typename T>
DLKERNELS_NOINLINE void pack_forward(
    const PackWeightArgs& args, const T* weight, int64_t begin, int64_t end) {
  for (int64_t out = begin; out < end; out += kVecSize) {
    for_each_vec(args.in, [&](int64_t in, auto lanes) {
      Vec values[kVecSize];
      for (int64_t k = 0; k < kVecSize; ++k) {
        values[k] = out + k < args.out
                        ? load(weight + (out + k) * args.in + in, lanes)
                        : Vec{};
      }
      transpose(values);
      const int64_t stop = smaller(kVecSize, args.in - in);
      for (int64_t k = 0; k < stop; ++k) {
        store(
            args.packed + packed_row(args.in, in + k, args.out, out),
            values[k]);
      }
    });
  }
}

// The same for the transposed matrix, whose columns are the inputs.
template <typename T>
DLKERNELS_NOINLINE void pack_transposed(
    const PackWeightArgs& args, const T* weight, int64_t begin, int64_t end) {
  for (int64_t out = 0; out < args.out; ++out) {
    for (int64_t in = begin; in < end; in += kVecSize) {
      const int64_t count = larger(0, smaller(kVecSize, args.in - in));
      const Vec values = count == kVecSize
                             ? load(weight + out * args.in + in)
                             : load(weight + out * args.in + in, count);
      store(args.packed + packed_row(args.out, out, args.in, in), values);
    }
  }
}

DLKERNELS_INLINE void pack_weight(
    const PackWeightArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* weight =
        static_cast<decltype(tag)>(const_cast<void*>(args.weight));
    args.transposed ? pack_transposed(args, weight, begin, end)
                    : pack_forward(args, weight, begin, end);
  });
}

DLKERNELS_INLINE void unpack_weight(
    const UnpackWeightArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    auto* weight = static_cast<decltype(tag)>(args.weight);
    const int64_t columns = padded_channels(args.out);
    const auto sum_of_threads = [&](int64_t in, int64_t out) {
      const float* from = args.partial + in * columns + out;
      Vec total = load(from);
      for (int64_t thread = 1; thread < args.threads; ++thread) {
        total += load(from + thread * args.in * columns);
      }
      return total;
    };
    for (int64_t out = begin; out < end; out += kVecSize) {
      const int64_t rows = smaller(kVecSize, args.out - out);
      for_each_vec(args.in, [&](int64_t in, auto lanes) {
        Vec values[kVecSize];
        for (int64_t k = 0; k < kVecSize; ++k) {
          values[k] = in + k < args.in ? sum_of_threads(in + k, out) : Vec{};
        }
        transpose(values);
        for (int64_t k = 0; k < rows; ++k) {
          store(weight + (out + k) * args.in + in, values[k], lanes);
        }
      });
    }
  });
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
};

DLKERNELS_INLINE Tile tile_at(const Tiling& tiling, int64_t index) {
  if (tiling.halo == 0) {
    const Grid& grid = tiling.grid;
    const int64_t area = grid.height * grid.width;
    const int64_t bands = tiling.bands;
    const int64_t sample = bands == 0 ? 0 : index / bands * area;
    const int64_t stop = bands == 0 ? grid.samples * area : sample + area;
    const int64_t first =
        sample + (bands == 0 ? index : index % bands) * tiling.size;
    return {tiling, 0, first, smaller(tiling.size, stop - first)};
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
DLKERNELS_INLINE void clear_padding(
    const Tile& tile, float* block, int64_t channels) {
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

template <typename Lanes>
DLKERNELS_INLINE Vec
apply(const Affine& affine, int64_t channel, Vec x, Lanes lanes) {
  return (x - load(affine.mean + channel, lanes)) *
             load(affine.scale + channel, lanes) +
         load(affine.shift + channel, lanes);
}

template <typename T>
DLKERNELS_NOINLINE void write_block_of(
    const Slice& out,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
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
}

// Writes a block of results to the slice, and leaves them in the block as they
// were rounded.
DLKERNELS_INLINE void write_block(
    const Slice& out,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  dispatch(out.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    write_block_of<T>(out, tile, first, count, block);
  });
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
