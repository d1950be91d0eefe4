#include "squeeze_excite.h"

#include "../reduce.h"
#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// The part of a sample that an item stands for.
struct Part {
  int64_t sample;
  int64_t begin;
  int64_t end;
};

Part part_of(const Maps& maps, int64_t item, int64_t extent) {
  const int64_t size = (extent + maps.parts - 1) / maps.parts;
  const int64_t begin = item % maps.parts * size;
  const int64_t end = begin + size;
  return {
      item / maps.parts,
      begin < extent ? begin : extent,
      end < extent ? end : extent};
}

// sums[c] = sum of value(offset, lanes) over the map, for the channels of part.
template <typename Value>
DLKERNELS_INLINE void sum_channels(
    const Maps& maps, const Part& part, float* sums, const Value& value) {
  const int64_t sample = part.sample * maps.channels * maps.area;
  if (maps.channels_last) {
    sum_columns(
        maps.area,
        part.end - part.begin,
        sums + part.begin,
        [&](int64_t row, int64_t column, auto lanes) {
          return value(
              sample + row * maps.channels + part.begin + column, lanes);
        });
    return;
  }
  for (int64_t c = part.begin; c < part.end; ++c) {
    const int64_t plane = sample + c * maps.area;
    sums[c] = sum_of(maps.area, [&](int64_t i, auto lanes) {
      return value(plane + i, lanes);
    });
  }
}

// Calls body(offset, factor, lanes) for every vector of the part, factor(c) or
// factors from c on being what the map's channel c is to be multiplied by.
template <typename Body>
DLKERNELS_INLINE void for_each_scaled(
    const Maps& maps, const Part& part, const Body& body) {
  const int64_t sample = part.sample * maps.channels * maps.area;
  if (maps.channels_last) {
    for (int64_t row = part.begin; row < part.end; ++row) {
      for_each_vec(maps.channels, [&](int64_t c, auto lanes) {
        const auto factor = [&](const float* of) {
          return load(of + part.sample * maps.channels + c, lanes);
        };
        body(sample + row * maps.channels + c, factor, lanes);
      });
    }
    return;
  }
  for (int64_t c = part.begin; c < part.end; ++c) {
    const int64_t channel = part.sample * maps.channels + c;
    const auto factor = [&](const float* of) { return broadcast(of[channel]); };
    for_each_vec(maps.area, [&](int64_t i, auto lanes) {
      body(sample + c * maps.area + i, factor, lanes);
    });
  }
}

int64_t scaled_extent(const Maps& maps) {
  return maps.channels_last ? maps.area : maps.channels;
}

DLKERNELS_INLINE Vec relu(Vec value) {
  return value < 0.0f ? Vec{} : value;
}

void pool(
    const Maps& maps,
    const void* x,
    float* pooled,
    int64_t begin,
    int64_t end) {
  dispatch(maps.dtype, [&](auto* tag) {
    const auto* values = static_cast<decltype(tag)>(const_cast<void*>(x));
    for (int64_t item = begin; item < end; ++item) {
      const Part part = part_of(maps, item, maps.channels);
      float* means = pooled + part.sample * maps.channels;
      sum_channels(maps, part, means, [&](int64_t i, auto lanes) {
        return load(values + i, lanes);
      });
      for (int64_t c = part.begin; c < part.end; ++c) {
        means[c] /= static_cast<float>(maps.area);
      }
    }
  });
}

void pool_backward(
    const Maps& maps,
    const void* grad_out,
    const void* out,
    const void* x,
    float* grad_scale,
    int64_t begin,
    int64_t end) {
  dispatch(maps.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* grads = static_cast<Pointer>(const_cast<void*>(grad_out));
    const auto* outs = static_cast<Pointer>(const_cast<void*>(out));
    const auto* values = static_cast<Pointer>(const_cast<void*>(x));
    for (int64_t item = begin; item < end; ++item) {
      const Part part = part_of(maps, item, maps.channels);
      float* sums = grad_scale + part.sample * maps.channels;
      if (outs == nullptr) {
        sum_channels(maps, part, sums, [&](int64_t i, auto lanes) {
          return load(grads + i, lanes) * load(values + i, lanes);
        });
      } else {
        sum_channels(maps, part, sums, [&](int64_t i, auto lanes) {
          const Vec product = load(grads + i, lanes) * load(values + i, lanes);
          return load(outs + i, lanes) > 0.0f ? product : Vec{};
        });
      }
    }
  });
}

void scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  dispatch(args.maps.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* x = static_cast<Pointer>(const_cast<void*>(args.x));
    const auto* shortcut =
        static_cast<Pointer>(const_cast<void*>(args.shortcut));
    auto* out = static_cast<Pointer>(args.out);
    const auto run = [&](const Part& part, const auto& finish) {
      for_each_scaled(
          args.maps, part, [&](int64_t i, const auto& factor, auto lanes) {
            const Vec scaled = load(x + i, lanes) * factor(args.scale);
            store(out + i, finish(scaled, i, lanes), lanes);
          });
    };
    for (int64_t item = begin; item < end; ++item) {
      const Part part = part_of(args.maps, item, scaled_extent(args.maps));
      if (shortcut == nullptr && !args.relu) {
        run(part, [](Vec scaled, int64_t, auto) { return scaled; });
      } else if (shortcut == nullptr) {
        run(part, [](Vec scaled, int64_t, auto) { return relu(scaled); });
      } else {
        run(part, [&](Vec scaled, int64_t i, auto lanes) {
          const Vec total = scaled + load(shortcut + i, lanes);
          return args.relu ? relu(total) : total;
        });
      }
    }
  });
}

void scale_backward(const ScaleBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.maps.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* grad_out =
        static_cast<Pointer>(const_cast<void*>(args.grad_out));
    const auto* out = static_cast<Pointer>(const_cast<void*>(args.out));
    auto* grad_x = static_cast<Pointer>(args.grad_x);
    auto* grad_shortcut = static_cast<Pointer>(args.grad_shortcut);
    const float inverse_area = 1.0f / static_cast<float>(args.maps.area);
    for (int64_t item = begin; item < end; ++item) {
      const Part part = part_of(args.maps, item, scaled_extent(args.maps));
      for_each_scaled(
          args.maps, part, [&](int64_t i, const auto& factor, auto lanes) {
            Vec grad = load(grad_out + i, lanes);
            if (out != nullptr) {
              grad = load(out + i, lanes) > 0.0f ? grad : Vec{};
            }
            if (grad_shortcut != nullptr) {
              store(grad_shortcut + i, grad, lanes);
            }
            const Vec grad_mean = factor(args.grad_pooled) * inverse_area;
            store(grad_x + i, grad * factor(args.scale) + grad_mean, lanes);
          });
    }
  });
}

void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* weight = static_cast<Pointer>(const_cast<void*>(args.weight));
    const auto* bias = static_cast<Pointer>(const_cast<void*>(args.bias));
    for (int64_t j = begin; j < end; ++j) {
      const auto* row = weight + j * args.in_features;
      const float offset = bias == nullptr ? 0.0f : load_one(bias + j);
      for (int64_t m = 0; m < args.rows; ++m) {
        const float* in = args.in + m * args.in_features;
        const float dot = sum_of(args.in_features, [&](int64_t k, auto lanes) {
          return load(row + k, lanes) * load(in + k, lanes);
        });
        args.out[m * args.out_features + j] = dot + offset;
      }
    }
  });
}

void linear_backward(const LinearArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* weight =
        static_cast<decltype(tag)>(const_cast<void*>(args.weight));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLinearBlock;
      const int64_t rest = args.in_features - first;
      const int64_t size = rest < kLinearBlock ? rest : kLinearBlock;
      for (int64_t m = 0; m < args.rows; ++m) {
        const float* grad = args.in + m * args.out_features;
        float* grad_in = args.out + m * args.in_features + first;
        sum_columns(
            args.out_features,
            size,
            grad_in,
            [&](int64_t j, int64_t k, auto lanes) {
              return grad[j] *
                     load(weight + j * args.in_features + first + k, lanes);
            });
      }
    }
  });
}

void linear_weight_backward(
    const LinearArgs& args,
    void* grad_weight,
    void* grad_bias,
    int64_t begin,
    int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    auto* weight = static_cast<decltype(tag)>(grad_weight);
    auto* bias = static_cast<decltype(tag)>(grad_bias);
    for (int64_t j = begin; j < end; ++j) {
      for_each_vec(args.in_features, [&](int64_t k, auto lanes) {
        Vec total{};
        for (int64_t m = 0; m < args.rows; ++m) {
          total += args.out[m * args.out_features + j] *
                   load(args.in + m * args.in_features + k, lanes);
        }
        store(weight + j * args.in_features + k, total, lanes);
      });
      float total = 0.0f;
      for (int64_t m = 0; m < args.rows; ++m) {
        total += args.out[m * args.out_features + j];
      }
      store_one(bias + j, total);
    }
  });
}

void activate(
    Activation activation, const float* hidden, float* out, int64_t size) {
  for_each_vec(size, [&](int64_t i, auto lanes) {
    const Vec z = load(hidden + i, lanes);
    store(
        out + i,
        activation == Activation::Relu ? relu(z) : z * sigmoid(z),
        lanes);
  });
}

void activate_backward(
    Activation activation, const float* hidden, float* grad, int64_t size) {
  for_each_vec(size, [&](int64_t i, auto lanes) {
    const Vec z = load(hidden + i, lanes);
    const Vec g = load(grad + i, lanes);
    if (activation == Activation::Relu) {
      store(grad + i, z > 0.0f ? g : Vec{}, lanes);
    } else {
      const Vec s = sigmoid(z);
      store(grad + i, g * s * (1.0f + z * (1.0f - s)), lanes);
    }
  });
}

void gate(Gate kind, float* values, int64_t size) {
  for_each_vec(size, [&](int64_t i, auto lanes) {
    const Vec z = load(values + i, lanes);
    if (kind == Gate::Sigmoid) {
      store(values + i, sigmoid(z), lanes);
    } else {
      const Vec clamped = minimum(maximum(z + 3.0f, Vec{}), broadcast(6.0f));
      store(values + i, clamped / 6.0f, lanes);
    }
  });
}

void gate_backward(Gate kind, const float* scale, float* grad, int64_t size) {
  for_each_vec(size, [&](int64_t i, auto lanes) {
    const Vec s = load(scale + i, lanes);
    const Vec g = load(grad + i, lanes);
    if (kind == Gate::Sigmoid) {
      store(grad + i, g * s * (1.0f - s), lanes);
    } else {
      store(grad + i, (s <= 0.0f) | (s >= 1.0f) ? Vec{} : g / 6.0f, lanes);
    }
  });
}

}  // namespace

extern const SqueezeExciteKernels squeeze_excite_kernels = {
    pool,
    pool_backward,
    scale,
    scale_backward,
    linear,
    linear_backward,
    linear_weight_backward,
    activate,
    activate_backward,
    gate,
    gate_backward,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
