#include "squeeze_excite.h"

#include <type_traits>

#include "../launch.h"

// A sample is summed by several blocks, each of which writes the sums over its
// stretch of the area; whoever reads them adds the stretches up in order. So no
// result depends on which block came first.

namespace dlkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Rows that a thread of a pass over maps writes.
constexpr int kRows = 4;

int64_t ceil_div(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

int64_t stretch_of(const Maps& maps) {
  return maps.channels_last ? 128 : 8192;
}

// ---- functions of single values -----------------------------------------

__device__ float relu(float z) {
  return z < 0 ? 0.0f : z;
}

__device__ float sigmoid(float z) {
  return 1.0f / (1.0f + expf(-z));
}

__device__ float activate(Activation activation, float z) {
  return activation == Activation::Relu ? relu(z) : z * sigmoid(z);
}

__device__ float activation_slope(Activation activation, float z) {
  if (activation == Activation::Relu) {
    return z > 0 ? 1.0f : 0.0f;
  }
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

__device__ float apply_gate(Gate gate, float z) {
  if (gate == Gate::Sigmoid) {
    return sigmoid(z);
  }
  const float shifted = relu(z + 3.0f);
  return (shifted > 6.0f ? 6.0f : shifted) / 6.0f;
}

__device__ float gate_slope(Gate gate, float scale) {
  if (gate == Gate::Sigmoid) {
    return scale * (1.0f - scale);
  }
  return scale <= 0.0f || scale >= 1.0f ? 0.0f : 1.0f / 6.0f;
}

// ---- sums over maps -----------------------------------------------------

template <typename T>
struct SumArgs {
  const T* x;
  const T* grad_out;  // or null: the sum of x alone
  const T* out;       // or null
  float* partial;
  int64_t samples;
  int64_t channels;
  int64_t area;
  int64_t splits;
  int64_t stretch;
};

// x, or x * grad_out where out > 0, at an offset.
template <int kVec, typename T>
__device__ Floats<kVec> summand(const SumArgs<T>& args, int64_t offset) {
  Floats<kVec> value = load<kVec>(args.x + offset);
  if (args.grad_out != nullptr) {
    const Floats<kVec> grad = load<kVec>(args.grad_out + offset);
    for (int v = 0; v < kVec; ++v) {
      value.values[v] *= grad.values[v];
    }
  }
  if (args.out != nullptr) {
    const Floats<kVec> out = load<kVec>(args.out + offset);
    for (int v = 0; v < kVec; ++v) {
      value.values[v] = out.values[v] > 0 ? value.values[v] : 0.0f;
    }
  }
  return value;
}

// Contiguous maps: a warp sums a stretch of one channel.
template <typename T, int kVec>
__global__ void sum_rows_kernel(SumArgs<T> args) {
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (warp >= args.samples * args.channels * args.splits) {
    return;
  }
  const int64_t row = warp / args.splits;
  const int64_t split = warp % args.splits;
  const int64_t lane = threadIdx.x % kWarpSize;
  const int64_t begin = split * args.stretch;
  const int64_t end =
      begin + args.stretch < args.area ? begin + args.stretch : args.area;
  float total = 0.0f;
  for (int64_t i = begin + lane * kVec; i < end; i += kWarpSize * kVec) {
    const Floats<kVec> value = summand<kVec>(args, row * args.area + i);
    for (int v = 0; v < kVec; ++v) {
      total += value.values[v];
    }
  }
  total = warp_sum(total);
  if (lane == 0) {
    const int64_t sample = row / args.channels;
    const int64_t channel = row % args.channels;
    args.partial[(sample * args.splits + split) * args.channels + channel] =
        total;
  }
}

// channels_last maps: a warp reads neighbouring channels of a pixel, the warps
// of a block share the pixels of a stretch.
template <typename T, int kVec>
__global__ void sum_columns_kernel(SumArgs<T> args) {
  constexpr int kChannels = kWarpSize * kVec;
  DLKERNELS_SHARED(float, sums, kWarps* kChannels);
  const int64_t blocks = (args.channels + kChannels - 1) / kChannels;
  const int64_t row = blockIdx.x / blocks;  // sample and split
  const int64_t first_channel = blockIdx.x % blocks * kChannels;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t sample = row / args.splits;
  const int64_t begin = row % args.splits * args.stretch;
  const int64_t end =
      begin + args.stretch < args.area ? begin + args.stretch : args.area;
  const int64_t channel = first_channel + lane * kVec;

  Floats<kVec> total{};
  if (channel < args.channels) {
    for (int64_t pixel = begin + warp; pixel < end; pixel += kWarps) {
      const int64_t offset =
          (sample * args.area + pixel) * args.channels + channel;
      const Floats<kVec> value = summand<kVec>(args, offset);
      for (int v = 0; v < kVec; ++v) {
        total.values[v] += value.values[v];
      }
    }
  }
  for (int v = 0; v < kVec; ++v) {
    sums[warp * kChannels + lane * kVec + v] = total.values[v];
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c < kChannels && first_channel + c < args.channels) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      sum += sums[w * kChannels + c];
    }
    args.partial[row * args.channels + first_channel + c] = sum;
  }
}

struct FinishArgs {
  const float* partial;
  const float* scale;  // or null: the mean over the area
  Gate gate;
  float* out;
  int64_t samples;
  int64_t channels;
  int64_t area;
  int64_t splits;
};

// Adds the stretches up: to the mean, or to the gradient before the gate.
__global__ void finish_sums_kernel(FinishArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.samples * args.channels) {
    return;
  }
  const int64_t sample = i / args.channels;
  const int64_t channel = i % args.channels;
  float total = 0.0f;
  for (int64_t split = 0; split < args.splits; ++split) {
    total +=
        args.partial[(sample * args.splits + split) * args.channels + channel];
  }
  args.out[i] = args.scale == nullptr
                    ? total / static_cast<float>(args.area)
                    : total * gate_slope(args.gate, args.scale[i]);
}

// ---- the two small layers -----------------------------------------------

template <typename T>
struct LinearArgs {
  const float* in;
  const T* weight;  // [out_features, in_features]
  const T* bias;    // or null
  float* out;
  int64_t samples;
  int64_t in_features;
  int64_t out_features;
};

// out = in @ weight^T + bias, a warp per output; the second layer reads its
// input through the activation and writes its output through the gate.
template <typename T, bool kSecond>
__global__ void linear_kernel(
    LinearArgs<T> args, Activation activation, Gate gate) {
  const int64_t output =
      static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (output >= args.samples * args.out_features) {
    return;
  }
  const float* in = args.in + output / args.out_features * args.in_features;
  const int64_t feature = output % args.out_features;
  const T* weight = args.weight + feature * args.in_features;
  const int64_t lane = threadIdx.x % kWarpSize;
  float total = 0.0f;
  for (int64_t k = lane; k < args.in_features; k += kWarpSize) {
    const float value = kSecond ? activate(activation, in[k]) : in[k];
    total += value * to_float(weight[k]);
  }
  total = warp_sum(total);
  if (lane == 0) {
    total += args.bias == nullptr ? 0.0f : to_float(args.bias[feature]);
    args.out[output] = kSecond ? apply_gate(gate, total) : total;
  }
}

// in = (out @ weight) * activation'(hidden), in and out being gradients here:
// a block per stretch of 32 inputs of a sample.
template <typename T>
__global__ void linear_backward_kernel(
    const float* grad_out,
    const T* weight,
    const float* hidden,  // or null: no activation
    float* grad_in,
    int64_t in_features,
    int64_t out_features,
    Activation activation) {
  DLKERNELS_SHARED(float, sums, kThreads);
  const int64_t blocks = (in_features + kWarpSize - 1) / kWarpSize;
  const int64_t sample = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t k = blockIdx.x % blocks * kWarpSize + lane;
  float total = 0.0f;
  if (k < in_features) {
    for (int64_t j = warp; j < out_features; j += kWarps) {
      total += grad_out[sample * out_features + j] *
               to_float(weight[j * in_features + k]);
    }
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp == 0 && k < in_features) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      sum += sums[w * kWarpSize + lane];
    }
    const int64_t i = sample * in_features + k;
    grad_in[i] =
        hidden == nullptr ? sum : sum * activation_slope(activation, hidden[i]);
  }
}

// grad_weight = grad_out^T @ in, grad_bias = the sum of grad_out: a thread per
// weight.
template <typename T, bool kSecond>
__global__ void weight_backward_kernel(
    const float* grad_out,
    const float* in,
    T* grad_weight,
    T* grad_bias,
    int64_t samples,
    int64_t in_features,
    int64_t out_features,
    Activation activation) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= in_features * out_features) {
    return;
  }
  const int64_t j = i / in_features;
  const int64_t k = i % in_features;
  float total = 0.0f;
  float total_bias = 0.0f;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const float grad = grad_out[sample * out_features + j];
    const float value = in[sample * in_features + k];
    total += grad * (kSecond ? activate(activation, value) : value);
    total_bias += grad;
  }
  assign(grad_weight[i], total);
  if (k == 0) {
    assign(grad_bias[j], total_bias);
  }
}

// ---- passes that write maps ---------------------------------------------

// How the threads of a block lie on maps: `across` neighbouring vectors of the
// contiguous extent, and rows of the other.
struct Tiling {
  int64_t inner;
  int64_t outer;
  int64_t inner_blocks;
  int64_t outer_blocks;
  int across;
};

Tiling tiling_of(const Maps& maps, int vec) {
  const int64_t inner = maps.channels_last ? maps.channels : maps.area;
  const int64_t outer = maps.channels_last ? maps.area : maps.channels;
  int across = 1;
  while (across < kThreads && across * vec < inner) {
    across *= 2;
  }
  const int64_t rows = kThreads / across * kRows;
  return {
      inner,
      outer,
      ceil_div(inner, across * vec),
      ceil_div(outer, rows),
      across};
}

// Calls body(offset, channel) for every vector of the thread; `channel` counts
// through all samples.
template <int kVec, bool kChannelsLast, typename Body>
__device__ void for_each_pack(const Tiling& tiling, const Body& body) {
  const int64_t inner_block = blockIdx.x % tiling.inner_blocks;
  const int64_t block = blockIdx.x / tiling.inner_blocks;
  const int64_t outer_block = block % tiling.outer_blocks;
  const int64_t sample = block / tiling.outer_blocks;
  const int down = kThreads / tiling.across;
  const int64_t column =
      (inner_block * tiling.across + threadIdx.x % tiling.across) * kVec;
  if (column >= tiling.inner) {
    return;
  }
  int64_t row = outer_block * down * kRows + threadIdx.x / tiling.across;
  for (int i = 0; i < kRows && row < tiling.outer; ++i, row += down) {
    const int64_t channel = kChannelsLast ? sample * tiling.inner + column
                                          : sample * tiling.outer + row;
    body((sample * tiling.outer + row) * tiling.inner + column, channel);
  }
}

// What the channels of a vector are multiplied by.
template <int kVec, bool kChannelsLast>
__device__ Floats<kVec> factors(const float* of, int64_t channel) {
  if constexpr (kChannelsLast) {
    return load<kVec>(of + channel);
  } else {
    const float value = of[channel];
    Floats<kVec> result;
    for (int v = 0; v < kVec; ++v) {
      result.values[v] = value;
    }
    return result;
  }
}

template <typename T, int kVec, bool kChannelsLast>
__global__ void scale_maps_kernel(
    Tiling tiling,
    const T* x,
    const float* scale,
    const T* shortcut,
    bool apply_relu,
    T* out) {
  for_each_pack<kVec, kChannelsLast>(
      tiling, [&](int64_t offset, int64_t channel) {
        Floats<kVec> value = load<kVec>(x + offset);
        const auto scales = factors<kVec, kChannelsLast>(scale, channel);
        for (int v = 0; v < kVec; ++v) {
          value.values[v] *= scales.values[v];
        }
        if (shortcut != nullptr) {
          const Floats<kVec> added = load<kVec>(shortcut + offset);
          for (int v = 0; v < kVec; ++v) {
            value.values[v] += added.values[v];
          }
        }
        if (apply_relu) {
          for (int v = 0; v < kVec; ++v) {
            value.values[v] = relu(value.values[v]);
          }
        }
        store<kVec>(out + offset, value);
      });
}

template <typename T, int kVec, bool kChannelsLast>
__global__ void scale_maps_backward_kernel(
    Tiling tiling,
    float area,
    const T* grad_out,
    const T* out,
    const float* scale,
    const float* grad_pooled,
    T* grad_x,
    T* grad_shortcut) {
  for_each_pack<kVec, kChannelsLast>(
      tiling, [&](int64_t offset, int64_t channel) {
        Floats<kVec> grad = load<kVec>(grad_out + offset);
        if (out != nullptr) {
          const Floats<kVec> value = load<kVec>(out + offset);
          for (int v = 0; v < kVec; ++v) {
            grad.values[v] = value.values[v] > 0 ? grad.values[v] : 0.0f;
          }
        }
        if (grad_shortcut != nullptr) {
          store<kVec>(grad_shortcut + offset, grad);
        }
        const auto scales = factors<kVec, kChannelsLast>(scale, channel);
        const auto grads = factors<kVec, kChannelsLast>(grad_pooled, channel);
        for (int v = 0; v < kVec; ++v) {
          grad.values[v] =
              grad.values[v] * scales.values[v] + grads.values[v] / area;
        }
        store<kVec>(grad_x + offset, grad);
      });
}

// ---- launches -----------------------------------------------------------

// Calls body(tag, vec, channels_last) with the element type and constants that
// fit the maps: 16 bytes a vector where extents and pointers allow it.
template <typename Body>
void dispatch_maps(const Maps& maps, bool aligned, const Body& body) {
  dispatch(maps.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int kWide = 16 / sizeof(T);
    const int64_t inner = maps.channels_last ? maps.channels : maps.area;
    const auto with_vec = [&](auto vec) {
      if (maps.channels_last) {
        body(tag, vec, std::true_type{});
      } else {
        body(tag, vec, std::false_type{});
      }
    };
    if (aligned && inner % kWide == 0) {
      with_vec(std::integral_constant<int, kWide>{});
    } else {
      with_vec(std::integral_constant<int, 1>{});
    }
  });
}

template <typename... Pointers>
bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

void sum_maps(
    const Maps& maps,
    const void* x,
    const void* grad_out,
    const void* out,
    float* partial,
    Stream stream) {
  dispatch_maps(
      maps,
      all_aligned(x, grad_out, out),
      [&](auto* tag, auto vec, auto channels_last) {
        using T = std::remove_pointer_t<decltype(tag)>;
        constexpr int kVec = decltype(vec)::value;
        const int64_t splits = splits_of(maps);
        const SumArgs<T> args{
            static_cast<const T*>(x),
            static_cast<const T*>(grad_out),
            static_cast<const T*>(out),
            partial,
            maps.samples,
            maps.channels,
            maps.area,
            splits,
            stretch_of(maps)};
        if constexpr (decltype(channels_last)::value) {
          const int64_t blocks = ceil_div(maps.channels, kWarpSize * kVec);
          launch(
              sum_columns_kernel<T, kVec>,
              maps.samples * splits * blocks,
              kThreads,
              stream,
              args);
        } else {
          launch(
              sum_rows_kernel<T, kVec>,
              ceil_div(maps.samples * maps.channels * splits, kWarps),
              kThreads,
              stream,
              args);
        }
      });
}

void finish_sums(
    const Maps& maps,
    const float* partial,
    const float* scale,
    Gate gate,
    float* out,
    Stream stream) {
  const FinishArgs args{
      partial,
      scale,
      gate,
      out,
      maps.samples,
      maps.channels,
      maps.area,
      splits_of(maps)};
  launch(
      finish_sums_kernel,
      ceil_div(maps.samples * maps.channels, kThreads),
      kThreads,
      stream,
      args);
}

}  // namespace

int64_t splits_of(const Maps& maps) {
  const int64_t splits = ceil_div(maps.area, stretch_of(maps));
  return splits > 0 ? splits : 1;
}

void squeeze_excite(const SqueezeExcite& args, Stream stream) {
  const Maps& maps = args.maps;
  sum_maps(maps, args.x, nullptr, nullptr, args.partial, stream);
  finish_sums(maps, args.partial, nullptr, args.gate, args.pooled, stream);
  dispatch(maps.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const LinearArgs<T> reduce{
        args.pooled,
        static_cast<const T*>(args.reduce_weight),
        static_cast<const T*>(args.reduce_bias),
        args.hidden,
        maps.samples,
        maps.channels,
        args.squeezed};
    const LinearArgs<T> expand{
        args.hidden,
        static_cast<const T*>(args.expand_weight),
        static_cast<const T*>(args.expand_bias),
        args.scale,
        maps.samples,
        args.squeezed,
        maps.channels};
    launch(
        linear_kernel<T, false>,
        ceil_div(maps.samples * args.squeezed, kWarps),
        kThreads,
        stream,
        reduce,
        args.activation,
        args.gate);
    launch(
        linear_kernel<T, true>,
        ceil_div(maps.samples * maps.channels, kWarps),
        kThreads,
        stream,
        expand,
        args.activation,
        args.gate);
  });
  dispatch_maps(
      maps,
      all_aligned(args.x, args.shortcut, args.out),
      [&](auto* tag, auto vec, auto channels_last) {
        using T = std::remove_pointer_t<decltype(tag)>;
        constexpr int kVec = decltype(vec)::value;
        const Tiling tiling = tiling_of(maps, kVec);
        launch(
            scale_maps_kernel<T, kVec, decltype(channels_last)::value>,
            maps.samples * tiling.outer_blocks * tiling.inner_blocks,
            kThreads,
            stream,
            tiling,
            static_cast<const T*>(args.x),
            args.scale,
            static_cast<const T*>(args.shortcut),
            args.relu,
            static_cast<T*>(args.out));
      });
}

void squeeze_excite_backward(const SqueezeExciteBackward& args, Stream stream) {
  const Maps& maps = args.maps;
  sum_maps(maps, args.x, args.grad_out, args.out, args.partial, stream);
  finish_sums(
      maps, args.partial, args.scale, args.gate, args.grad_logits, stream);
  dispatch(maps.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(
        linear_backward_kernel<T>,
        maps.samples * ceil_div(args.squeezed, kWarpSize),
        kThreads,
        stream,
        args.grad_logits,
        static_cast<const T*>(args.expand_weight),
        args.hidden,
        args.grad_hidden,
        args.squeezed,
        maps.channels,
        args.activation);
    launch(
        linear_backward_kernel<T>,
        maps.samples * ceil_div(maps.channels, kWarpSize),
        kThreads,
        stream,
        args.grad_hidden,
        static_cast<const T*>(args.reduce_weight),
        nullptr,
        args.grad_pooled,
        maps.channels,
        args.squeezed,
        args.activation);
    const int64_t weights = ceil_div(maps.channels * args.squeezed, kThreads);
    launch(
        weight_backward_kernel<T, true>,
        weights,
        kThreads,
        stream,
        args.grad_logits,
        args.hidden,
        static_cast<T*>(args.grad_expand_weight),
        static_cast<T*>(args.grad_expand_bias),
        maps.samples,
        args.squeezed,
        maps.channels,
        args.activation);
    launch(
        weight_backward_kernel<T, false>,
        weights,
        kThreads,
        stream,
        args.grad_hidden,
        args.pooled,
        static_cast<T*>(args.grad_reduce_weight),
        static_cast<T*>(args.grad_reduce_bias),
        maps.samples,
        maps.channels,
        args.squeezed,
        args.activation);
  });
  dispatch_maps(
      maps,
      all_aligned(args.grad_out, args.out, args.grad_x, args.grad_shortcut),
      [&](auto* tag, auto vec, auto channels_last) {
        using T = std::remove_pointer_t<decltype(tag)>;
        constexpr int kVec = decltype(vec)::value;
        const Tiling tiling = tiling_of(maps, kVec);
        launch(
            scale_maps_backward_kernel<T, kVec, decltype(channels_last)::value>,
            maps.samples * tiling.outer_blocks * tiling.inner_blocks,
            kThreads,
            stream,
            tiling,
            static_cast<float>(maps.area),
            static_cast<const T*>(args.grad_out),
            static_cast<const T*>(args.out),
            args.scale,
            args.grad_pooled,
            static_cast<T*>(args.grad_x),
            static_cast<T*>(args.grad_shortcut));
      });
}

}  // namespace dlkernels::cuda
