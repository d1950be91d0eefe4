#include "squeeze_excite.h"

#include "../multiply.h"
#include "../reduce.h"
#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// The part of a sample that an item stands for: channels, or rows of all
// channels when channels_last.
struct Part {
  int64_t sample;
  int64_t begin;
  int64_t end;
};

Part part_of(const Maps& maps, int64_t item) {
  const int64_t extent = maps.channels_last ? maps.area : maps.channels;
  const int64_t size = (extent + maps.parts - 1) / maps.parts;
  const int64_t begin = item % maps.parts * size;
  const int64_t end = begin + size;
  return {
      item / maps.parts,
      begin < extent ? begin : extent,
      end < extent ? end : extent};
}

// The sums of value(offset, lanes) over each of the items.
template <typename Value>
DLKERNELS_INLINE void sum_items(
    const Maps& maps,
    float* sums,
    int64_t begin,
    int64_t end,
    const Value& value) {
  for (int64_t item = begin; item < end; ++item) {
    const Part part = part_of(maps, item);
    const int64_t sample = part.sample * maps.channels * maps.area;
    if (maps.channels_last) {
      const int64_t first = sample + part.begin * maps.channels;
      sum_columns(
          part.end - part.begin,
          maps.channels,
          sums + item * maps.channels,
          [&](int64_t row, int64_t column, auto lanes) {
            return value(first + row * maps.channels + column, lanes);
          });
      continue;
    }
    const int64_t first = sample + part.begin * maps.area;
    sum_planes(
        part.end - part.begin,
        maps.area,
        sums + part.sample * maps.channels + part.begin,
        [&](int64_t plane, int64_t i, auto lanes) {
          return value(first + plane * maps.area + i, lanes);
        });
  }
}

// Calls body(offset, factor, lanes) for every vector of the items, factor(of)
// being what the map's channel is to be multiplied by. Stretches of memory go
// last to first, so that what was read last is found in cache; inside of one
// memory is read forward, as prefetchers expect.
template <typename T, typename Body>
DLKERNELS_INLINE void for_each_scaled(
    const Maps& maps,
    int64_t begin,
    int64_t end,
    const T* out,
    const Body& body) {
  constexpr int64_t kStretch = 1 << 16;
  const int64_t run = maps.channels_last ? maps.channels : maps.area;
  const int64_t runs = run < kStretch ? kStretch / (run > 0 ? run : 1) : 1;
  for (int64_t item = end - 1; item >= begin; --item) {
    const Part part = part_of(maps, item);
    const int64_t sample = part.sample * maps.channels * maps.area;
    const int64_t first_channel = part.sample * maps.channels;
    const auto scale_row = [&](int64_t row) {
      const int64_t first = sample + row * run;
      for_each_vec(maps.streamed, out + first, run, [&](int64_t c, auto lanes) {
        const auto factor = [&](const float* of) {
          return load(of + first_channel + c, lanes);
        };
        body(first + c, factor, lanes);
      });
    };
    const auto scale_plane = [&](int64_t c) {
      const int64_t first = sample + c * run;
      const auto factor = [&](const float* of) {
        return broadcast(of[first_channel + c]);
      };
      for_each_vec(maps.streamed, out + first, run, [&](int64_t i, auto lanes) {
        body(first + i, factor, lanes);
      });
    };
    for (int64_t stop = part.end; stop > part.begin; stop -= runs) {
      const int64_t start = stop - runs > part.begin ? stop - runs : part.begin;
      for (int64_t r = start; r < stop; ++r) {
        maps.channels_last ? scale_row(r) : scale_plane(r);
      }
    }
  }
  if (maps.streamed) {
    finish_streams();
  }
}

// How many features of a layer the block that begins at `first` has.
DLKERNELS_INLINE int64_t block_size(int64_t features, int64_t first) {
  const int64_t rest = features - first;
  return rest < kLinearBlock ? rest : kLinearBlock;
}

DLKERNELS_INLINE Vec relu(Vec value) {
  return value < 0.0f ? Vec{} : value;
}

void pool(
    const Maps& maps, const void* x, float* sums, int64_t begin, int64_t end) {
  dispatch(maps.dtype, [&](auto* tag) {
    const auto* values = static_cast<decltype(tag)>(const_cast<void*>(x));
    sum_items(maps, sums, begin, end, [&](int64_t i, auto lanes) {
      return load(values + i, lanes);
    });
  });
}

void pool_backward(
    const Maps& maps,
    const void* grad_out,
    const void* out,
    const void* x,
    float* sums,
    int64_t begin,
    int64_t end) {
  dispatch(maps.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* grads = static_cast<Pointer>(const_cast<void*>(grad_out));
    const auto* outs = static_cast<Pointer>(const_cast<void*>(out));
    const auto* values = static_cast<Pointer>(const_cast<void*>(x));
    if (outs == nullptr) {
      sum_items(maps, sums, begin, end, [&](int64_t i, auto lanes) {
        return load(grads + i, lanes) * load(values + i, lanes);
      });
    } else {
      sum_items(maps, sums, begin, end, [&](int64_t i, auto lanes) {
        const Vec product = load(grads + i, lanes) * load(values + i, lanes);
        return load(outs + i, lanes) > 0.0f ? product : Vec{};
      });
    }
  });
}

void combine(
    const Maps& maps,
    int64_t samples,
    const float* sums,
    float factor,
    float* out) {
  const int64_t parts = maps.channels_last ? maps.parts : 1;
  for (int64_t n = 0; n < samples; ++n) {
    const float* first = sums + n * parts * maps.channels;
    for_each_vec(maps.channels, [&](int64_t c, auto lanes) {
      Vec total = load(first + c, lanes);
      for (int64_t p = 1; p < parts; ++p) {
        total += load(first + p * maps.channels + c, lanes);
      }
      store(out + n * maps.channels + c, total * factor, lanes);
    });
  }
}

void scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  dispatch(args.maps.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* x = static_cast<Pointer>(const_cast<void*>(args.x));
    const auto* shortcut =
        static_cast<Pointer>(const_cast<void*>(args.shortcut));
    auto* out = static_cast<Pointer>(args.out);
    const auto run = [&](const auto& finish) {
      for_each_scaled(
          args.maps,
          begin,
          end,
          out,
          [&](int64_t i, const auto& factor, auto lanes) {
            const Vec scaled = load(x + i, lanes) * factor(args.scale);
            store(out + i, finish(scaled, i, lanes), lanes);
          });
    };
    if (shortcut == nullptr && !args.relu) {
      run([](Vec scaled, int64_t, auto) { return scaled; });
    } else if (shortcut == nullptr) {
      run([](Vec scaled, int64_t, auto) { return relu(scaled); });
    } else {
      run([&](Vec scaled, int64_t i, auto lanes) {
        const Vec total = scaled + load(shortcut + i, lanes);
        return args.relu ? relu(total) : total;
      });
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
    const auto run = [&](const auto& gradient) {
      for_each_scaled(
          args.maps,
          begin,
          end,
          grad_x,
          [&](int64_t i, const auto& factor, auto lanes) {
            const Vec grad = gradient(i, lanes);
            const Vec grad_mean = factor(args.grad_pooled) * inverse_area;
            store(grad_x + i, grad * factor(args.scale) + grad_mean, lanes);
          });
    };
    const auto masked = [&](int64_t i, auto lanes) {
      const Vec grad = load(grad_out + i, lanes);
      return load(out + i, lanes) > 0.0f ? grad : Vec{};
    };
    if (out == nullptr) {
      run([&](int64_t i, auto lanes) { return load(grad_out + i, lanes); });
    } else if (grad_shortcut == nullptr) {
      run(masked);
    } else {
      run([&](int64_t i, auto lanes) {
        const Vec grad = masked(i, lanes);
        store(grad_shortcut + i, grad, lanes);
        return grad;
      });
    }
  });
}

void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* weight = static_cast<Pointer>(const_cast<void*>(args.weight));
    const auto* bias = static_cast<Pointer>(const_cast<void*>(args.bias));
    const int64_t depth = args.in_features;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLinearBlock;
      const int64_t size = block_size(args.out_features, first);
      multiply_transposed(
          args.rows,
          size,
          depth,
          [&](int64_t m, int64_t k, auto lanes) {
            return load(args.in + m * depth + k, lanes);
          },
          [&](int64_t j, int64_t k, auto lanes) {
            return load(weight + (first + j) * depth + k, lanes);
          },
          [&](int64_t m, int64_t j, float dot) {
            const float offset =
                bias == nullptr ? 0.0f : load_one(bias + first + j);
            args.out[m * args.out_features + first + j] = dot + offset;
          });
    }
  });
}

// grad_in of kRows rows from the weights of kDepth output features, added to
// what is there unless these are the first.
template <int64_t kRows, int64_t kDepth, typename T>
DLKERNELS_INLINE void add_products(
    const LinearArgs& args,
    const T* weight,
    int64_t m,
    int64_t j,
    int64_t begin,
    int64_t end) {
  const float* grad = args.in + m * args.out_features + j;
  float* out = args.out + m * args.in_features + begin;
  weight += j * args.in_features + begin;
  for_each_vec(end - begin, [&](int64_t k, auto lanes) {
    Vec rows[kDepth];
    for (int64_t d = 0; d < kDepth; ++d) {
      rows[d] = load(weight + d * args.in_features + k, lanes);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      float* to = out + r * args.in_features + k;
      Vec total = j == 0 ? Vec{} : load(to, lanes);
      for (int64_t d = 0; d < kDepth; ++d) {
        total += grad[r * args.out_features + d] * rows[d];
      }
      store(to, total, lanes);
    }
  });
}

// Weights are read in order of memory.
void linear_backward(const LinearArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* weight =
        static_cast<decltype(tag)>(const_cast<void*>(args.weight));
    const int64_t first = begin * kLinearBlock;
    const int64_t stop = end * kLinearBlock < args.in_features
                             ? end * kLinearBlock
                             : args.in_features;
    const auto strip = [&](auto height, int64_t m) {
      constexpr int64_t kRows = decltype(height)::value;
      int64_t j = 0;
      for (; j + 4 <= args.out_features; j += 4) {
        add_products<kRows, 4>(args, weight, m, j, first, stop);
      }
      for (; j < args.out_features; ++j) {
        add_products<kRows, 1>(args, weight, m, j, first, stop);
      }
    };
    int64_t m = 0;
    for (; m + 4 <= args.rows; m += 4) {
      strip(Constant<4>{}, m);
    }
    for (; m < args.rows; ++m) {
      strip(Constant<1>{}, m);
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
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLinearBlock;
      const int64_t size = block_size(args.out_features, first);
      multiply(
          size,
          args.in_features,
          args.rows,
          [&](int64_t j, int64_t m) {
            return args.out[m * args.out_features + first + j];
          },
          [&](int64_t m, int64_t k, auto lanes) {
            return load(args.in + m * args.in_features + k, lanes);
          },
          [&](int64_t j, int64_t k, Vec total, auto lanes) {
            store(weight + (first + j) * args.in_features + k, total, lanes);
          });
      float sums[kLinearBlock];
      sum_columns(args.rows, size, sums, [&](int64_t m, int64_t j, auto lanes) {
        return load(args.out + m * args.out_features + first + j, lanes);
      });
      for_each_vec(size, [&](int64_t j, auto lanes) {
        store(bias + first + j, load(sums + j, lanes), lanes);
      });
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
    combine,
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
