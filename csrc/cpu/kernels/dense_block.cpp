#include "dense_block.h"

#include <type_traits>

#include "../tile.h"
#include "../winograd.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// ---- weights ------------------------------------------------------------

// The elements of 3x3 kernels.
void pack_elements(const PackArgs& args, int64_t begin, int64_t end) {
  const PackConv3x3Args kernels{
      args.dtype,
      args.channels_last,
      args.transposed ? args.out : args.in,
      args.transposed ? args.in : args.out,
      args.transposed,
      args.weight,
      args.packed};
  pack_kernels(kernels, begin, end);
}

void pack(const PackArgs& args, int64_t begin, int64_t end) {
  begin *= kChannelGroup;
  end *= kChannelGroup;
  if (args.kernel == 3) {
    pack_elements(args, begin, end);
  } else {
    pack_weight(
        {args.weight,
         args.dtype,
         args.in,
         args.out,
         args.transposed,
         args.packed},
        begin,
        end);
  }
}

// The gradients of the elements of 3x3 kernels: for each block of inputs
// [panels, kElements, rows, kPanel].
struct ElementGradients {
  int64_t first;  // float
  int64_t rows;
  int64_t panel_step;
};

ElementGradients element_gradients(
    int64_t in, int64_t inputs, int64_t outputs) {
  const auto rows_of_block = [&](int64_t first) {
    return rounded_up(smaller(kBlock, inputs - first), kChannelRows);
  };
  const int64_t block_size =
      kElements * rows_of_block(0) * rounded_up(outputs, kPanel);
  const int64_t rows = rows_of_block(in / kBlock * kBlock);
  return {in / kBlock * block_size, rows, kElements * rows * kPanel};
}

void unpack_elements(const UnpackArgs& args, int64_t begin, int64_t end) {
  const int64_t out_step = args.in * 9;
  dispatch(args.dtype, [&](auto* tag) {
    auto* weight = static_cast<decltype(tag)>(args.weight);
    for (int64_t in = 0; in < args.in; in += kVecSize) {
      const auto [first, rows, panel_step] =
          element_gradients(in, args.in, args.out);
      for (int64_t out = begin; out < end; out += kVecSize) {
        unpack_square(
            args.partial + first + out / kPanel * panel_step + out % kPanel +
                in % kBlock * kPanel,
            rows * kPanel,
            args.threads,
            gradient_size(3, args.in, args.out),
            smaller(kVecSize, args.in - in),
            smaller(kVecSize, end - out),
            weight + out * out_step + in * 9,
            out_step);
      }
    }
  });
}

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) {
  begin *= kChannelGroup;
  end = smaller(end * kChannelGroup, args.out);
  if (args.kernel == 3) {
    unpack_elements(args, begin, end);
  } else {
    unpack_weight(
        {args.partial,
         args.threads,
         args.in,
         args.out,
         args.weight,
         args.dtype},
        begin,
        end);
  }
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

// ---- 3x3 kernels --------------------------------------------------------

// Tiles of minimal filtering that are worked on together, in the second-level
// cache.
constexpr int64_t kFilterTiles = kMaxFilterTiles / kTileRows * kTileRows;

// Calls body(row, column, first, count) for each stretch of the tiles of 2x2
// outputs [begin, end) that lies in one row of them; `first` counts from begin.
template <typename Body>
DLKERNELS_INLINE void for_each_stretch(
    const Tile& tile, int64_t begin, int64_t end, const Body& body) {
  const int64_t columns = (tile.tiling.grid.width + 1) / 2;
  for (int64_t i = begin; i < end;) {
    const int64_t column = i % columns;
    const int64_t count = smaller(columns - column, end - i);
    body(i / columns, column, i - begin, count);
    i += count;
  }
}

// Calls body(begin, end) for groups of the tiles of 2x2 outputs of a tile.
template <typename Body>
DLKERNELS_INLINE void for_each_filter_group(
    const Tile& tile, const Body& body) {
  const int64_t columns = (tile.tiling.grid.width + 1) / 2;
  const int64_t total = (tile.count + 1) / 2 * columns;
  for (int64_t begin = 0; begin < total; begin += kFilterTiles) {
    body(begin, smaller(begin + kFilterTiles, total));
  }
}

// The elements of the tiles [begin, end) from a block of a tile.
template <typename Transform>
void transform_block(
    const Tile& tile,
    const float* block,
    int64_t channels,
    int64_t begin,
    int64_t end,
    const Elements& to) {
  constexpr int64_t kMargin = Transform::kOverlap / 2;
  const int64_t width = tile.tiling.grid.width;
  Strip strip;
  for (int64_t channel = 0; channel < channels; channel += kVecSize) {
    for_each_stretch(
        tile,
        begin,
        end,
        [&](int64_t row, int64_t column, int64_t first, int64_t count) {
          const int64_t x = 2 * column - kMargin;
          Window<float, Transform::kRows> window;
          window.columns = 2 * count + Transform::kOverlap;
          window.begin = 0;
          window.end = smaller(window.columns, width + kMargin - x);
          for (int i = 0; i < Transform::kRows; ++i) {
            const int64_t y = 2 * row - kMargin + i;
            const int64_t position = tile.centre() + y * tile.pitch() + x;
            window.rows[i] = y < tile.count + kMargin
                                 ? block + position * kPitch + channel
                                 : nullptr;
          }
          transform_pixels<Transform>(window, kPitch, Full{}, strip);
          clear_columns(strip, window.end, window.columns);
          transform_rows<Transform>(strip, to, first, count, channel);
        });
  }
}

// From a block of a tile with its halo to one without: to (+)= the convolution
// with the packed elements of kernels from `inputs` channels, `depth` of them.
void filter(
    const Tile& tile,
    const float* block,
    int64_t depth,
    const float* weight,
    int64_t inputs,
    int64_t columns,
    float* to,
    bool accumulate,
    float* scratch) {
  const int64_t width = tile.tiling.grid.width;
  const Elements input = row_elements(scratch, kFilterTiles, depth);
  const Elements products =
      row_elements(scratch + input.size(), kFilterTiles, columns);
  const auto put = [&](float* at, Vec value, auto lanes) {
    store(at, accumulate ? load(at) + value : value, lanes);
  };
  for_each_filter_group(tile, [&](int64_t begin, int64_t end) {
    transform_block<InputTransform>(tile, block, depth, begin, end, input);
    multiply_elements(
        input, end - begin, depth, weight, inputs, columns, products);
    for (int64_t c = 0; c < columns; c += kVecSize) {
      for_each_stretch(
          tile,
          begin,
          end,
          [&](int64_t row, int64_t column, int64_t first, int64_t count) {
            const int64_t position = 2 * (row * tile.pitch() + column);
            const Outputs<float> outputs{
                to + position * kPitch + c,
                smaller(2, tile.count - 2 * row),
                smaller(2 * count, width - 2 * column),
                tile.pitch() * kPitch};
            const float* from = products.data + first * products.width + c;
            write_pixels(outputs, kPitch, products, from, Vec{}, Full{}, put);
          });
    }
  });
}

// Adds the gradient of the elements of kernels to `total`.
void filter_gradient(
    const Tile& tile,
    const float* activated,
    int64_t width,
    const float* grad,
    int64_t depth,
    int64_t rows,
    float* total,
    float* scratch) {
  const Elements input = slice_elements(scratch, kFilterTiles, width);
  const Elements output =
      panel_elements(scratch + input.size(), kFilterTiles, depth);
  for_each_filter_group(tile, [&](int64_t begin, int64_t end) {
    transform_block<InputTransform>(tile, activated, width, begin, end, input);
    transform_block<OutputTransform>(tile, grad, depth, begin, end, output);
    for (int64_t panel = 0; panel < output.groups; ++panel) {
      for (int64_t e = 0; e < kElements; ++e) {
        multiply_gradients(
            input,
            output,
            e,
            panel,
            depth - panel * kPanel,
            end - begin,
            rows,
            total + (panel * kElements + e) * rows * kPanel,
            true);
      }
    }
  });
}

// ---- convolution --------------------------------------------------------

void conv(const ConvArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t length = tile_length(args.tiling);
  const int64_t inputs = args.in.count;
  const int64_t outputs = args.out.count;
  float* activated = scratch;
  float* results = scratch + length * kPitch;
  float* rest = results + block_count(outputs) * length * kPitch;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    for (int64_t in = 0; in < inputs; in += kBlock) {
      const int64_t depth = smaller(kBlock, inputs - in);
      load_normalised(args.in, args.norm, tile, in, depth, activated, nullptr);
      for (int64_t out = 0; out < outputs; out += kBlock) {
        const int64_t columns = padded_channels(smaller(kBlock, outputs - out));
        float* to = results + out / kBlock * length * kPitch;
        if (args.tiling.halo != 0) {
          const float* weight =
              args.weight + out * kElements * inputs + in * kPanel;
          filter(
              tile,
              activated,
              depth,
              weight,
              inputs,
              columns,
              to,
              in > 0,
              rest);
          continue;
        }
        multiply<false>(
            {tile.count,
             depth,
             columns,
             activated,
             args.weight + packed_offset(inputs, in, out, columns),
             0,
             to,
             kPitch,
             in > 0});
      }
    }
    for (int64_t out = 0; out < outputs; out += kBlock) {
      const int64_t count = smaller(kBlock, outputs - out);
      float* block = results + out / kBlock * length * kPitch;
      apply_dropout(args.dropout, outputs, tile, false, block, out, count);
      write_block(args.out, tile, out, count, block);
      keep_moments(tile, block, index, outputs, out, count, args.moments);
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

// The gradients of a block of inputs and the weights from there to a block of
// outputs, for a 3x3 kernel.
void filter_backward(
    const ConvBackwardArgs& args,
    const ConvGradients& gradients,
    const Tile& tile,
    int64_t in,
    int64_t out,
    const float* activated,
    const float* grad,
    float* grad_activated,
    float* scratch) {
  const int64_t inputs = args.in.count, outputs = args.grad_out.count;
  const int64_t width = smaller(kBlock, inputs - in);
  const int64_t depth = smaller(kBlock, outputs - out);
  const auto [first, rows, panel_step] = element_gradients(in, inputs, outputs);
  float* total = gradients.weight + first + out / kPanel * panel_step;
  filter_gradient(tile, activated, width, grad, depth, rows, total, scratch);
  const float* weight = args.weight + in * kElements * outputs + out * kPanel;
  filter(
      tile,
      grad,
      depth,
      weight,
      outputs,
      padded_channels(width),
      grad_activated,
      out > 0,
      scratch);
}

// The same for a 1x1 kernel and a number of pixels.
void multiply_backward(
    const ConvBackwardArgs& args,
    const ConvGradients& gradients,
    int64_t in,
    int64_t out,
    int64_t pixels,
    const float* activated,
    const float* grad,
    float* grad_activated) {
  const int64_t inputs = args.in.count, outputs = args.grad_out.count;
  const int64_t padded_outputs = padded_channels(outputs);
  const int64_t width = smaller(kBlock, inputs - in);
  const int64_t depth = smaller(kBlock, outputs - out);
  const int64_t columns = padded_channels(width);
  multiply<true>(
      {width,
       pixels,
       padded_channels(depth),
       activated,
       grad,
       kPitch,
       gradients.weight + in * padded_outputs + out,
       padded_outputs,
       true});
  multiply<false>(
      {pixels,
       depth,
       columns,
       grad,
       args.weight + packed_offset(outputs, out, in, columns),
       0,
       grad_activated,
       kPitch,
       out > 0});
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
  float* activated = scratch;
  float* raw = scratch + block_size;
  float* grad_activated = scratch + 2 * block_size;
  float* grad = scratch + 3 * block_size;
  float* rest = grad + block_count(outputs) * block_size;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    for (int64_t out = 0; out < outputs; out += kBlock) {
      const int64_t count = smaller(kBlock, outputs - out);
      float* block = grad + out / kBlock * block_size;
      load_gradient(
          args.grad_out, args.out, args.correction, tile, out, count, block);
      apply_dropout(args.dropout, outputs, tile, true, block, out, count);
    }
    for (int64_t in = 0; in < inputs; in += kBlock) {
      const int64_t width = smaller(kBlock, inputs - in);
      load_normalised(args.in, args.norm, tile, in, width, activated, raw);
      for (int64_t out = 0; out < outputs; out += kBlock) {
        const float* block = grad + out / kBlock * block_size;
        if (args.tiling.halo != 0) {
          filter_backward(
              args,
              gradients,
              tile,
              in,
              out,
              activated,
              block,
              grad_activated,
              rest);
        } else {
          multiply_backward(
              args,
              gradients,
              in,
              out,
              tile.count,
              activated,
              block,
              grad_activated);
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
