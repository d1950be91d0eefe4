#include "batch_norm_act.h"

#include "../batch_norm_channel.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

using Args = BatchNormActArgs;

// ---- contiguous maps ----------------------------------------------------

void forward(const Args& args, int64_t begin, int64_t end) {
  specialize(args, [&](auto* tag, const auto& act) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t c = begin; c < end; ++c) {
      settle_channel(args, x, c);
      apply_to_channel(args, act, x, c);
    }
  });
}

void backward(const Args& args, int64_t begin, int64_t end) {
  specialize(args, [&](auto* tag, const auto& act) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    const auto* grad_out =
        static_cast<decltype(tag)>(const_cast<void*>(args.grad_out));
    auto* grad_x = static_cast<decltype(tag)>(args.grad_x);
    for (int64_t c = begin; c < end; ++c) {
      set_scale(args, c);
      const auto gradient = channel_gradient(args, act, x, c);
      const auto recomputed = [&](int64_t n, int64_t i, auto lanes) {
        const Vec grad = load(grad_out + plane_of(args, n, c) + i, lanes);
        return gradient(n, i, grad, lanes);
      };
      channel_backward(
          args,
          c,
          recomputed,
          recomputed,
          [&](int64_t n, int64_t i, Vec grad, auto lanes) {
            store(grad_x + plane_of(args, n, c) + i, grad, lanes);
          });
    }
  });
}

// ---- channels_last maps -------------------------------------------------

// Some pixels of one sample: rows of all channels.
struct Block {
  int64_t sample;
  int64_t rows;
  int64_t offset;  // of the first row in the maps
  float* first;    // two rows of partial results, [channels] each
  float* second;
};

Block block_of(const Args& args, int64_t item) {
  const int64_t sample = item / args.blocks_per_sample;
  const int64_t begin = item % args.blocks_per_sample * args.rows_per_block;
  const int64_t rest = args.area - begin;
  float* partial = args.partial + 2 * item * args.channels;
  return {
      sample,
      rest < args.rows_per_block ? rest : args.rows_per_block,
      (sample * args.area + begin) * args.channels,
      partial,
      partial + args.channels};
}

// Mean and sum of squared deviations from it, of each channel of each block.
// Values are taken relative to the maps' first pixel: a mean far from zero then
// costs no digits when blocks are combined.
void statistics(const Args& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t item = begin; item < end; ++item) {
      const Block block = block_of(args, item);
      const auto value = [&](int64_t row, int64_t c, auto lanes) {
        return load(x + block.offset + row * args.channels + c, lanes) -
               load(x + c, lanes);
      };
      sum_columns(block.rows, args.channels, block.first, value);
      for_each_vec(args.channels, [&](int64_t c, auto lanes) {
        const Vec mean =
            load(block.first + c, lanes) / static_cast<float>(block.rows);
        store(block.first + c, mean, lanes);
      });
      sum_columns(
          block.rows,
          args.channels,
          block.second,
          [&](int64_t row, int64_t c, auto lanes) {
            const Vec deviation =
                value(row, c, lanes) - load(block.first + c, lanes);
            return deviation * deviation;
          });
    }
  });
}

float first_pixel(const Args& args, int64_t c) {
  float value = 0.0f;
  dispatch(args.dtype, [&](auto* tag) {
    if (args.samples * args.area > 0) {
      value =
          load_one(static_cast<decltype(tag)>(const_cast<void*>(args.x)) + c);
    }
  });
  return value;
}

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
// computing sample variances" (1979), equation 2.1.
void combine_statistics(const Args& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.samples * args.blocks_per_sample;
  for (int64_t c = begin; c < end; ++c) {
    double count = 0.0;
    double mean = 0.0;  // relative to the first pixel
    double squares = 0.0;
    for (int64_t item = 0; item < blocks; ++item) {
      const Block block = block_of(args, item);
      const auto rows = static_cast<double>(block.rows);
      const double delta = block.first[c] - mean;
      mean += delta * rows / (count + rows);
      squares +=
          block.second[c] + delta * delta * count * rows / (count + rows);
      count += rows;
    }
    args.mean[c] = static_cast<float>(first_pixel(args, c) + mean);
    args.var[c] = static_cast<float>(squares / count);
  }
}

void set_scales(const Args& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    set_scale(args, c);
  }
}

// The sums of the outputs of a block are left in its first partial row.
void apply(const Args& args, int64_t begin, int64_t end) {
  specialize(args, [&](auto* tag, const auto& act) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    const auto* residual =
        static_cast<decltype(tag)>(const_cast<void*>(args.residual));
    auto* out = static_cast<decltype(tag)>(args.out);
    for (int64_t item = begin; item < end; ++item) {
      const Block block = block_of(args, item);
      const float factor = sample_scale(args, block.sample);
      const auto write = [&](int64_t row, int64_t c, auto lanes) {
        const int64_t i = block.offset + row * args.channels + c;
        const Vec deviation = load(x + i, lanes) - load(args.mean + c, lanes);
        const Vec norm = deviation * load(args.scale + c, lanes) +
                         load(args.bias + c, lanes);
        Vec value = act.value(norm) * factor;
        if (residual != nullptr) {
          value += load(residual + i, lanes);
        }
        store(out + i, value, lanes);
        return value;
      };
      if (args.pooled == nullptr) {
        for (int64_t row = 0; row < block.rows; ++row) {
          for_each_vec(args.channels, [&](int64_t c, auto lanes) {
            write(row, c, lanes);
          });
        }
      } else {
        sum_columns(block.rows, args.channels, block.first, write);
      }
    }
  });
}

void combine_pooled(const Args& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    float* pooled = args.pooled + n * args.channels;
    const int64_t first = n * args.blocks_per_sample;
    sum_columns(
        args.blocks_per_sample,
        args.channels,
        pooled,
        [&](int64_t row, int64_t c, auto lanes) {
          return load(block_of(args, first + row).first + c, lanes);
        });
    for_each_vec(args.channels, [&](int64_t c, auto lanes) {
      const Vec mean = load(pooled + c, lanes) / static_cast<float>(args.area);
      store(pooled + c, mean, lanes);
    });
  }
}

// Calls body(block, gradient), gradient(row, channel, lanes) being what
// backward recomputes.
template <typename Body>
DLKERNELS_INLINE void for_each_gradient_block(
    const Args& args, int64_t begin, int64_t end, const Body& body) {
  specialize(args, [&](auto* tag, const auto& act) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    const auto* grad_out =
        static_cast<decltype(tag)>(const_cast<void*>(args.grad_out));
    const float inverse_area = 1.0f / static_cast<float>(args.area);
    for (int64_t item = begin; item < end; ++item) {
      const Block block = block_of(args, item);
      const float factor = sample_scale(args, block.sample);
      const float* pooled =
          args.grad_pooled == nullptr
              ? nullptr
              : args.grad_pooled + block.sample * args.channels;
      body(tag, block, [&](int64_t row, int64_t c, auto lanes) {
        const int64_t i = block.offset + row * args.channels + c;
        const Vec deviation = load(x + i, lanes) - load(args.mean + c, lanes);
        const Vec norm = deviation * load(args.scale + c, lanes) +
                         load(args.bias + c, lanes);
        Vec grad = load(grad_out + i, lanes);
        if (pooled != nullptr) {
          grad += load(pooled + c, lanes) * inverse_area;
        }
        return Gradient{grad * factor * act.slope(norm), deviation};
      });
    }
  });
}

void gradient_sums(const Args& args, int64_t begin, int64_t end) {
  for_each_gradient_block(
      args, begin, end, [&](auto*, const Block& block, const auto& gradient) {
        sum_pairs_of_columns(
            block.rows,
            args.channels,
            block.first,
            block.second,
            [&](int64_t row, int64_t c, auto lanes) {
              const Gradient at = gradient(row, c, lanes);
              return VecPair{at.of_norm, at.of_norm * at.deviation};
            });
      });
}

// The terms of the input's gradient are left in the first block's partial rows.
void combine_gradients(const Args& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.samples * args.blocks_per_sample;
  for (int64_t c = begin; c < end; ++c) {
    double sum_grad = 0.0;
    double sum_deviation = 0.0;
    for (int64_t item = 0; item < blocks; ++item) {
      const Block block = block_of(args, item);
      sum_grad += block.first[c];
      sum_deviation += block.second[c];
    }
    const InputGradient terms =
        finish_gradients(args, c, sum_grad, sum_deviation);
    if (blocks > 0) {
      args.partial[c] = terms.shift;
      args.partial[args.channels + c] = terms.slope;
    }
  }
}

void input_gradient(const Args& args, int64_t begin, int64_t end) {
  const float* shift = args.partial;
  const float* slope = args.partial + args.channels;
  for_each_gradient_block(
      args,
      begin,
      end,
      [&](auto* tag, const Block& block, const auto& gradient) {
        auto* grad_x = static_cast<decltype(tag)>(args.grad_x);
        for (int64_t row = 0; row < block.rows; ++row) {
          for_each_vec(args.channels, [&](int64_t c, auto lanes) {
            const Gradient at = gradient(row, c, lanes);
            const Vec grad = at.of_norm - load(shift + c, lanes) -
                             at.deviation * load(slope + c, lanes);
            store(
                grad_x + block.offset + row * args.channels + c,
                grad * load(args.scale + c, lanes),
                lanes);
          });
        }
      });
}

}  // namespace

extern const BatchNormActKernels batch_norm_act_kernels = {
    forward,
    backward,
    statistics,
    combine_statistics,
    set_scales,
    apply,
    combine_pooled,
    gradient_sums,
    combine_gradients,
    input_gradient,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
