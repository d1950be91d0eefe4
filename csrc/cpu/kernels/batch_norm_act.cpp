#include "batch_norm_act.h"

#include <type_traits>

#include "../nonlinearity.h"
#include "../reduce.h"
#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

using Args = BatchNormActArgs;

float square_root(float value) {
  return __builtin_sqrtf(value);
}

float inverse_deviation(const Args& args, int64_t c) {
  return 1.0f / square_root(args.var[c] + args.eps);
}

void set_scale(const Args& args, int64_t c) {
  const float weight = args.weight == nullptr ? 1.0f : args.weight[c];
  args.scale[c] = weight * inverse_deviation(args, c);
}

double count_of(const Args& args) {
  return static_cast<double>(args.samples) * static_cast<double>(args.area);
}

float sample_scale(const Args& args, int64_t sample) {
  return args.sample_scale == nullptr ? 1.0f : args.sample_scale[sample];
}

// What grad_out is increased by at every pixel of a sample's channel.
float pooled_gradient(const Args& args, int64_t sample, int64_t c) {
  return args.grad_pooled == nullptr
             ? 0.0f
             : args.grad_pooled[sample * args.channels + c] /
                   static_cast<float>(args.area);
}

// The input's gradient is scale * (g - shift - (x - mean) * slope), g being the
// gradient of the norm's output; both terms come from the batch statistics.
struct InputGradient {
  float shift;
  float slope;
};

InputGradient finish_gradients(
    const Args& args, int64_t c, double sum, double sum_deviation) {
  const float inverse = inverse_deviation(args, c);
  args.grad_bias[c] = static_cast<float>(sum);
  args.grad_weight[c] = static_cast<float>(sum_deviation * inverse);
  if (!args.batch_statistics) {
    return {0.0f, 0.0f};
  }
  const double count = count_of(args);
  return {
      static_cast<float>(sum / count),
      static_cast<float>(sum_deviation * inverse * inverse / count)};
}

// Calls body(typed null pointer, activation).
template <typename Body>
DLKERNELS_INLINE void specialize(const Args& args, const Body& body) {
  dispatch(args.dtype, [&](auto* tag) {
    with_nonlinearity(args.activation, args.negative_slope, [&](auto act) {
      body(tag, act);
    });
  });
}

// ---- contiguous maps ----------------------------------------------------

// The sum over all samples of a channel of value(offset, lanes).
template <typename Value>
DLKERNELS_INLINE double sum_channel(
    const Args& args, int64_t c, const Value& value) {
  double total = 0.0;
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t plane = (n * args.channels + c) * args.area;
    total += sum_of(args.area, [&](int64_t i, auto lanes) {
      return value(plane + i, lanes);
    });
  }
  return total;
}

template <typename T>
DLKERNELS_INLINE void channel_statistics(
    const Args& args, const T* x, int64_t c) {
  const double count = count_of(args);
  const double total = sum_channel(
      args, c, [&](int64_t i, auto lanes) { return load(x + i, lanes); });
  const float mean = static_cast<float>(total / count);
  const double squares = sum_channel(args, c, [&](int64_t i, auto lanes) {
    const Vec deviation = load(x + i, lanes) - mean;
    return keep(deviation * deviation, lanes);
  });
  args.mean[c] = mean;
  args.var[c] = static_cast<float>(squares / count);
}

template <typename T, typename Act>
DLKERNELS_INLINE void apply_to_channel(
    const Args& args, const Act& act, const T* x, int64_t c) {
  const auto* residual = static_cast<const T*>(args.residual);
  auto* out = static_cast<T*>(args.out);
  const float mean = args.mean[c];
  const float scale = args.scale[c];
  const float bias = args.bias[c];
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t plane = (n * args.channels + c) * args.area;
    const float factor = sample_scale(args, n);
    const auto write = [&](int64_t i, auto lanes) {
      Vec value =
          act.value((load(x + plane + i, lanes) - mean) * scale + bias) *
          factor;
      if (residual != nullptr) {
        value += load(residual + plane + i, lanes);
      }
      store(out + plane + i, value, lanes);
      return keep(value, lanes);
    };
    if (args.pooled == nullptr) {
      for_each_vec(args.area, write);
    } else {
      args.pooled[n * args.channels + c] =
          sum_of(args.area, write) / static_cast<float>(args.area);
    }
  }
}

void forward(const Args& args, int64_t begin, int64_t end) {
  specialize(args, [&](auto* tag, const auto& act) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t c = begin; c < end; ++c) {
      if (args.batch_statistics) {
        channel_statistics(args, x, c);
      }
      set_scale(args, c);
      apply_to_channel(args, act, x, c);
    }
  });
}

// What backward recomputes of a vector of the input.
struct Gradient {
  Vec of_norm;    // of the norm's output
  Vec deviation;  // x - mean
};

template <typename T, typename Act>
DLKERNELS_INLINE void channel_backward(
    const Args& args, const Act& act, int64_t c) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* grad_out = static_cast<const T*>(args.grad_out);
  auto* grad_x = static_cast<T*>(args.grad_x);
  const float mean = args.mean[c];
  const float scale = args.scale[c];
  const float bias = args.bias[c];
  const auto gradient = [&](int64_t n, int64_t i, auto lanes) {
    const Vec deviation = load(x + i, lanes) - mean;
    const Vec grad = (load(grad_out + i, lanes) + pooled_gradient(args, n, c)) *
                     sample_scale(args, n);
    return Gradient{grad * act.slope(deviation * scale + bias), deviation};
  };
  double sum_grad = 0.0;
  double sum_deviation = 0.0;
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t plane = (n * args.channels + c) * args.area;
    const Pair sums = sum_pairs_of(args.area, [&](int64_t i, auto lanes) {
      const Gradient at = gradient(n, plane + i, lanes);
      return VecPair{
          keep(at.of_norm, lanes), keep(at.of_norm * at.deviation, lanes)};
    });
    sum_grad += sums.first;
    sum_deviation += sums.second;
  }
  const InputGradient terms =
      finish_gradients(args, c, sum_grad, sum_deviation);
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t plane = (n * args.channels + c) * args.area;
    for_each_vec(args.area, [&](int64_t i, auto lanes) {
      const Gradient at = gradient(n, plane + i, lanes);
      const Vec grad = at.of_norm - terms.shift - at.deviation * terms.slope;
      store(grad_x + plane + i, grad * scale, lanes);
    });
  }
}

void backward(const Args& args, int64_t begin, int64_t end) {
  specialize(args, [&](auto* tag, const auto& act) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t c = begin; c < end; ++c) {
      set_scale(args, c);
      channel_backward<T>(args, act, c);
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
