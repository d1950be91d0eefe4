#include "conv3x3.h"

#include <type_traits>

#include "../transpose.h"
#include "../winograd.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// Output channels that are transformed back together.
constexpr int64_t kColumns = 128;

// Of the second-level cache, for the transformed input of a block of tiles.
constexpr int64_t kBlockFloats = 1 << 18;

// Tiles of a block, at most.
constexpr int64_t kMaxTiles = 56;

void pack(const PackConv3x3Args& args, int64_t begin, int64_t end) {
  pack_kernels(args, begin * kPanel, end * kPanel);
}

// ---- tiles --------------------------------------------------------------

// Neighbouring tiles of one row of tiles.
struct Run {
  int64_t sample;
  int64_t y;  // of the first output
  int64_t x;
  int64_t first;  // tile, from the first of all runs
  int64_t count;  // of tiles
};

// Calls body with the runs that the tiles [begin, end) consist of.
template <typename Body>
DLKERNELS_INLINE void for_each_run(
    const Conv3x3Shape& shape, int64_t begin, int64_t end, const Body& body) {
  const int64_t columns = shape.tile_columns();
  const int64_t rows = shape.tile_rows();
  for (int64_t tile = begin; tile < end;) {
    const int64_t row = tile / columns;
    const int64_t column = tile % columns;
    const int64_t fitting = smaller(columns - column, kMaxRun);
    const int64_t count = smaller(fitting, end - tile);
    body(Run{row / rows, row % rows * 2, column * 2, tile - begin, count});
    tile += count;
  }
}

// What is transformed, and how far a tile begins before its outputs.
template <typename T>
struct Maps {
  const T* data;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t margin;
  bool channels_last;
};

template <typename T>
DLKERNELS_INLINE Maps<T> inputs_of(const Conv3x3Shape& shape, const void* x) {
  return {
      static_cast<const T*>(x),
      shape.in_channels,
      shape.height,
      shape.width,
      shape.padding,
      shape.channels_last};
}

template <typename T>
DLKERNELS_INLINE Maps<T> outputs_of(
    const Conv3x3Shape& shape, const void* grad_out) {
  return {
      static_cast<const T*>(grad_out),
      shape.out_channels,
      shape.out_height(),
      shape.out_width(),
      0,
      shape.channels_last};
}

template <typename Transform, typename T>
DLKERNELS_INLINE Window<T, Transform::kRows> window_of(
    const Maps<T>& maps, const Run& run, int64_t channel) {
  const int64_t area = maps.height * maps.width;
  const int64_t left = run.x - maps.margin;
  const T* plane = maps.data + run.sample * maps.channels * area +
                   channel * (maps.channels_last ? 1 : area);
  Window<T, Transform::kRows> window;
  window.columns = 2 * run.count + Transform::kOverlap;
  window.begin = larger(0, -left);
  window.end = larger(window.begin, smaller(window.columns, maps.width - left));
  for (int i = 0; i < Transform::kRows; ++i) {
    const int64_t y = run.y - maps.margin + i;
    const int64_t pixel = y * maps.width + left;
    window.rows[i] =
        y >= 0 && y < maps.height
            ? plane + pixel * (maps.channels_last ? maps.channels : 1)
            : nullptr;
  }
  return window;
}

template <typename Transform, typename T>
DLKERNELS_INLINE void transform_planes(
    const Window<T, Transform::kRows>& window,
    int64_t area,
    int64_t channels,
    Strip& strip) {
  for_each_vec(window.end - window.begin, [&](int64_t part, auto lanes) {
    const int64_t x = window.begin + part;
    Vec squares[4][kVecSize];
    for (int64_t c = 0; c < kVecSize; ++c) {
      Vec values[Transform::kRows], elements[4];
#pragma GCC unroll 4
      for (int i = 0; i < Transform::kRows; ++i) {
        const T* row = window.rows[i];
        values[i] =
            row && c < channels ? load(row + c * area + x, lanes) : Vec{};
      }
      Transform::column(values, elements);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        squares[i][c] = elements[i];
      }
    }
    const int64_t count = smaller(kVecSize, window.end - x);
    for (int i = 0; i < 4; ++i) {
      transpose(squares[i]);
      for (int64_t k = 0; k < count; ++k) {
        store(strip.at(i, x + k), squares[i][k]);
      }
    }
  });
}

// The elements of the tiles [begin, end).
template <typename Transform, typename T>
void transform_maps(
    const Conv3x3Shape& shape,
    const Maps<T>& maps,
    int64_t begin,
    int64_t end,
    const Elements& to) {
  Strip strip;
  for (int64_t channel = 0; channel < maps.channels; channel += kVecSize) {
    const int64_t channels = smaller(kVecSize, maps.channels - channel);
    for_each_run(shape, begin, end, [&](const Run& run) {
      const auto window = window_of<Transform>(maps, run, channel);
      clear_columns(strip, 0, window.begin);
      clear_columns(strip, window.end, window.columns);
      if (!maps.channels_last) {
        const int64_t area = maps.height * maps.width;
        transform_planes<Transform>(window, area, channels, strip);
      } else if (channels == kVecSize) {
        transform_pixels<Transform>(window, maps.channels, Full{}, strip);
      } else {
        transform_pixels<Transform>(window, maps.channels, channels, strip);
      }
      transform_rows<Transform>(strip, to, run.first, run.count, channel);
    });
  }
}

// ---- forward ------------------------------------------------------------

int64_t block_tiles(const Conv3x3Shape& shape) {
  const int64_t fitting =
      kBlockFloats /
      (row_elements(nullptr, kTileRows, shape.in_channels).size());
  return kTileRows * larger(1, smaller(fitting, kMaxTiles / kTileRows));
}

struct Block {
  Elements input;
  Elements products;
};

Block block_of(const Conv3x3Shape& shape, float* scratch) {
  const int64_t room = block_tiles(shape);
  const int64_t columns = smaller(kColumns, shape.out_channels);
  const Elements input = row_elements(scratch, room, shape.in_channels);
  return {input, row_elements(scratch + input.size(), room, columns)};
}

int64_t scratch_floats(const Conv3x3Shape& shape) {
  const Block block = block_of(shape, nullptr);
  return block.input.size() + block.products.size();
}

template <typename T>
DLKERNELS_INLINE Outputs<T> outputs_of(
    const Conv3x3Shape& shape, T* out, const Run& run, int64_t channel) {
  const int64_t height = shape.out_height(), width = shape.out_width();
  const int64_t channels = shape.out_channels;
  const int64_t pixel = run.y * width + run.x;
  T* sample = out + run.sample * channels * height * width;
  Outputs<T> outputs;
  outputs.data =
      sample + (shape.channels_last ? pixel * channels + channel
                                    : channel * height * width + pixel);
  outputs.rows = smaller(2, height - run.y);
  outputs.columns = smaller(2 * run.count, width - run.x);
  outputs.row_step = shape.channels_last ? width * channels : width;
  return outputs;
}

template <typename T>
DLKERNELS_INLINE void write_planes(
    const Outputs<T>& to,
    int64_t area,
    const Elements& products,
    const float* from,
    Vec bias,
    int64_t channels) {
  Strip strip;
  for (int64_t x = 0; x < to.columns; x += 2) {
    Vec values[2][2];
    transform_products(from, products.step(), bias, values);
    for (int y = 0; y < 2; ++y) {
      store(strip.at(y, x), values[y][0]);
      store(strip.at(y, x + 1), values[y][1]);
    }
    from += products.width;
  }
  for (int64_t y = 0; y < to.rows; ++y) {
    for_each_vec(to.columns, [&](int64_t x, auto lanes) {
      Vec values[kVecSize];
      for (int64_t i = 0; i < kVecSize; ++i) {
        values[i] = load(strip.at(y, x + i));
      }
      transpose(values);
      for (int64_t c = 0; c < channels; ++c) {
        store(to.data + c * area + y * to.row_step + x, values[c], lanes);
      }
    });
  }
}

// The outputs of the tiles [begin, end), for the channels [first, stop).
template <typename T>
void write_outputs(
    const Conv3x3Args& args,
    const Elements& products,
    int64_t begin,
    int64_t end,
    int64_t first,
    int64_t stop) {
  const Conv3x3Shape& shape = args.shape;
  const T* biases = static_cast<const T*>(args.bias);
  const auto put = [](T* at, Vec value, auto lanes) {
    store(at, value, lanes);
  };
  for (int64_t c = first; c < stop; c += kVecSize) {
    const int64_t channels = smaller(kVecSize, stop - c);
    const Vec bias = biases ? load(biases + c, channels) : Vec{};
    for_each_run(shape, begin, end, [&](const Run& run) {
      const auto to = outputs_of(shape, static_cast<T*>(args.out), run, c);
      const float* from =
          products.data + run.first * products.width + c - first;
      if (!shape.channels_last) {
        const int64_t area = shape.out_height() * shape.out_width();
        write_planes(to, area, products, from, bias, channels);
      } else if (channels == kVecSize) {
        write_pixels(to, shape.out_channels, products, from, bias, Full{}, put);
      } else {
        write_pixels(
            to, shape.out_channels, products, from, bias, channels, put);
      }
    });
  }
}

void forward(
    const Conv3x3Args& args,
    float* scratch,
    int64_t first_panel,
    int64_t stop_panel,
    int64_t begin,
    int64_t end) {
  const Conv3x3Shape& shape = args.shape;
  const Block block = block_of(shape, scratch);
  const int64_t stop_tile = smaller(end * kTileRows, shape.tiles());
  const int64_t stop_channel = smaller(stop_panel * kPanel, shape.out_channels);
  dispatch(shape.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto maps = inputs_of<T>(shape, args.x);
    for (int64_t tile = begin * kTileRows; tile < stop_tile;
         tile += block.input.room) {
      const int64_t tile_end = smaller(tile + block.input.room, stop_tile);
      transform_maps<InputTransform>(shape, maps, tile, tile_end, block.input);
      for (int64_t c = first_panel * kPanel; c < stop_channel; c += kColumns) {
        const int64_t c_end = smaller(c + kColumns, stop_channel);
        multiply_elements(
            block.input,
            tile_end - tile,
            shape.in_channels,
            args.weight + c * kElements * shape.in_channels,
            shape.in_channels,
            c_end - c,
            block.products);
        write_outputs<T>(args, block.products, tile, tile_end, c, c_end);
      }
    }
  });
}

// ---- gradient of the weight ---------------------------------------------

struct Gradients {
  Elements input;
  Elements output;
};

Gradients gradients_of(const Conv3x3Shape& shape, float* data, int64_t room) {
  const Elements input = slice_elements(data, room, shape.in_channels);
  return {input, panel_elements(data + input.size(), room, shape.out_channels)};
}

int64_t rows(const Conv3x3Shape& shape) {
  return rounded_up(shape.in_channels, kChannelRows);
}

int64_t tile_floats(const Conv3x3Shape& shape) {
  const Gradients gradients = gradients_of(shape, nullptr, 1);
  return gradients.input.size() + gradients.output.size();
}

int64_t total_floats(const Conv3x3Shape& shape) {
  return kElements * rows(shape) * rounded_up(shape.out_channels, kPanel);
}

void transform(const Conv3x3WeightArgs& args, int64_t begin, int64_t end) {
  const Conv3x3Shape& shape = args.shape;
  Gradients to = gradients_of(shape, args.elements, args.room);
  to.input.data += begin * to.input.width;
  to.output.data += begin * to.output.width;
  const int64_t first = args.first + begin, stop = args.first + end;
  dispatch(shape.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    transform_maps<InputTransform>(
        shape, inputs_of<T>(shape, args.x), first, stop, to.input);
    transform_maps<OutputTransform>(
        shape, outputs_of<T>(shape, args.grad_out), first, stop, to.output);
  });
}

void multiply(const Conv3x3WeightArgs& args, int64_t begin, int64_t end) {
  const auto [input, output] =
      gradients_of(args.shape, args.elements, args.room);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / kElements;
    multiply_gradients(
        input,
        output,
        item % kElements,
        panel,
        args.shape.out_channels - panel * kPanel,
        args.count,
        rows(args.shape),
        args.total + item * rows(args.shape) * kPanel,
        args.first > 0);
  }
}

void unpack(const UnpackConv3x3Args& args, int64_t begin, int64_t end) {
  const Conv3x3Shape& shape = args.shape;
  const int64_t element_step = rows(shape) * kPanel;
  const int64_t out_step = shape.in_channels * 9;
  const int64_t stop = smaller(end * kPanel, shape.out_channels);
  dispatch(shape.dtype, [&](auto* tag) {
    auto* weight = static_cast<decltype(tag)>(args.grad_weight);
    for (int64_t out = begin * kPanel; out < stop; out += kVecSize) {
      const float* panel =
          args.total + out / kPanel * kElements * element_step + out % kPanel;
      for (int64_t in = 0; in < shape.in_channels; in += kVecSize) {
        unpack_square(
            panel + in * kPanel,
            element_step,
            1,
            0,
            smaller(kVecSize, shape.in_channels - in),
            smaller(kVecSize, stop - out),
            weight + out * out_step + in * 9,
            out_step);
      }
    }
  });
}

}  // namespace

extern const Conv3x3Kernels conv3x3_kernels = {
    kPanel,
    kTileRows,
    scratch_floats,
    tile_floats,
    total_floats,
    pack,
    forward,
    transform,
    multiply,
    unpack,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
