#pragma once

// What batch norm does to one channel of contiguous maps, all samples of it
// while they lie in cache; for kernels that have a batch norm inside.

#include "kernels/batch_norm_act.h"
#include "nonlinearity.h"
#include "reduce.h"
#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

DLKERNELS_INLINE float square_root(float value) {
  return __builtin_sqrtf(value);
}

DLKERNELS_INLINE float inverse_deviation(
    const BatchNormActArgs& args, int64_t c) {
  return 1.0f / square_root(args.var[c] + args.eps);
}

DLKERNELS_INLINE void set_scale(const BatchNormActArgs& args, int64_t c) {
  const float weight = args.weight == nullptr ? 1.0f : args.weight[c];
  args.scale[c] = weight * inverse_deviation(args, c);
}

// Values of a channel; 1 of an empty batch, whose mean and variance are 0.
DLKERNELS_INLINE double count_of(const BatchNormActArgs& args) {
  const int64_t count = args.samples * args.area;
  return count == 0 ? 1.0 : static_cast<double>(count);
}

DLKERNELS_INLINE float sample_scale(
    const BatchNormActArgs& args, int64_t sample) {
  return args.sample_scale == nullptr ? 1.0f : args.sample_scale[sample];
}

// What grad_out is increased by at every pixel of a sample's channel.
DLKERNELS_INLINE float pooled_gradient(
    const BatchNormActArgs& args, int64_t sample, int64_t c) {
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

DLKERNELS_INLINE InputGradient finish_gradients(
    const BatchNormActArgs& args, int64_t c, double sum, double sum_deviation) {
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
DLKERNELS_INLINE void specialize(
    const BatchNormActArgs& args, const Body& body) {
  dispatch(args.dtype, [&](auto* tag) {
    with_nonlinearity(args.activation, args.negative_slope, [&](auto act) {
      body(tag, act);
    });
  });
}

// The norm of one channel of contiguous maps.
struct ChannelNorm {
  float mean;
  float scale;
  float bias;

  DLKERNELS_MEMBER ChannelNorm(const BatchNormActArgs& args, int64_t c)
      : mean(args.mean[c]), scale(args.scale[c]), bias(args.bias[c]) {}

  DLKERNELS_MEMBER Vec operator()(Vec x) const {
    return (x - mean) * scale + bias;
  }
};

DLKERNELS_INLINE int64_t
plane_of(const BatchNormActArgs& args, int64_t sample, int64_t c) {
  return (sample * args.channels + c) * args.area;
}

// The sum over all samples of a channel of value(offset, lanes).
template <typename Value>
DLKERNELS_INLINE double sum_channel(
    const BatchNormActArgs& args, int64_t c, const Value& value) {
  double total = 0.0;
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t plane = plane_of(args, n, c);
    total += sum_of(args.area, [&](int64_t i, auto lanes) {
      return value(plane + i, lanes);
    });
  }
  return total;
}

// Settles the channel's mean and variance, if they are to be the batch's, and
// its scale.
template <typename T>
DLKERNELS_INLINE void settle_channel(
    const BatchNormActArgs& args, const T* x, int64_t c) {
  if (args.batch_statistics) {
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
  set_scale(args, c);
}

template <typename T, typename Act>
DLKERNELS_INLINE void apply_to_channel(
    const BatchNormActArgs& args, const Act& act, const T* x, int64_t c) {
  const auto* residual = static_cast<const T*>(args.residual);
  auto* out = static_cast<T*>(args.out);
  const ChannelNorm norm(args, c);
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t plane = plane_of(args, n, c);
    const float factor = sample_scale(args, n);
    const auto write = [&](int64_t i, auto lanes) {
      Vec value = act.value(norm(load(x + plane + i, lanes))) * factor;
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

// What backward recomputes of a vector of the input.
struct Gradient {
  Vec of_norm;    // of the norm's output
  Vec deviation;  // x - mean
};

// What backward recomputes at pixel i of sample n from the gradient of out.
template <typename T, typename Act>
DLKERNELS_INLINE auto channel_gradient(
    const BatchNormActArgs& args, const Act& act, const T* x, int64_t c) {
  const ChannelNorm norm(args, c);
  return [=, &args](int64_t n, int64_t i, Vec grad_out, auto lanes) {
    const Vec value = load(x + plane_of(args, n, c) + i, lanes);
    const Vec grad =
        (grad_out + pooled_gradient(args, n, c)) * sample_scale(args, n);
    return Gradient{grad * act.slope(norm(value)), value - norm.mean};
  };
}

// first(n, i, lanes) gives the Gradient at pixel i of sample n, again(n, i,
// lanes) the same a second time, and write(n, i, grad, lanes) takes the
// gradient of the input.
template <typename First, typename Again, typename Write>
DLKERNELS_INLINE void channel_backward(
    const BatchNormActArgs& args,
    int64_t c,
    const First& first,
    const Again& again,
    const Write& write) {
  double sum_grad = 0.0;
  double sum_deviation = 0.0;
  for (int64_t n = 0; n < args.samples; ++n) {
    const Pair sums = sum_pairs_of(args.area, [&](int64_t i, auto lanes) {
      const Gradient at = first(n, i, lanes);
      return VecPair{
          keep(at.of_norm, lanes), keep(at.of_norm * at.deviation, lanes)};
    });
    sum_grad += sums.first;
    sum_deviation += sums.second;
  }
  const InputGradient terms =
      finish_gradients(args, c, sum_grad, sum_deviation);
  const float scale = args.scale[c];
  for (int64_t n = 0; n < args.samples; ++n) {
    for_each_vec(args.area, [&](int64_t i, auto lanes) {
      const Gradient at = again(n, i, lanes);
      const Vec grad = at.of_norm - terms.shift - at.deviation * terms.slope;
      write(n, i, grad * scale, lanes);
    });
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
