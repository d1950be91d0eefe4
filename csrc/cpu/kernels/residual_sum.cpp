#include "residual_sum.h"

#include "../nonlinearity.h"
#include "../reduce.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

using Args = ResidualSumArgs;

// What an item covers: some pixels of all channels of a sample, or all pixels
// of one channel.
struct Item {
  int64_t sample;
  int64_t channel;  // of contiguous maps
  int64_t rows;     // of channels_last maps
  int64_t offset;   // of its first value in the maps
  float* first;     // where its sums go
  float* second;
};

DLKERNELS_INLINE Item item_of(const Args& args, int64_t item) {
  if (!args.channels_last) {
    return {
        item / args.channels,
        item % args.channels,
        1,
        item * args.area,
        args.first + item,
        args.second + item};
  }
  const int64_t sample = item / args.blocks_per_sample;
  const int64_t begin = item % args.blocks_per_sample * args.rows_per_block;
  const int64_t rest = args.area - begin;
  float* partial = args.partial + 2 * item * args.channels;
  return {
      sample,
      0,
      rest < args.rows_per_block ? rest : args.rows_per_block,
      (sample * args.area + begin) * args.channels,
      partial,
      partial + args.channels};
}

// Calls body(i, of_channel, of_sample, lanes) for every vector of an item: i is
// its place in the maps; of_channel(values, lanes) are those of its channels
// among values [channels], of_sample those among [samples, channels].
template <typename Body>
DLKERNELS_INLINE void for_each(
    const Args& args, const Item& item, const Body& body) {
  const int64_t sample = item.sample * args.channels;
  if (!args.channels_last) {
    const int64_t c = item.channel;
    const auto of_channel = [&](const float* of, auto) {
      return broadcast(of[c]);
    };
    const auto of_sample = [&](const float* of, auto) {
      return broadcast(of[sample + c]);
    };
    for_each_vec(args.area, [&](int64_t i, auto lanes) {
      body(item.offset + i, of_channel, of_sample, lanes);
    });
    return;
  }
  for (int64_t row = 0; row < item.rows; ++row) {
    for_each_vec(args.channels, [&](int64_t c, auto lanes) {
      const auto of_channel = [&](const float* of, auto count) {
        return load(of + c, count);
      };
      const auto of_sample = [&](const float* of, auto count) {
        return load(of + sample + c, count);
      };
      body(item.offset + row * args.channels + c, of_channel, of_sample, lanes);
    });
  }
}

// ---- statistics ---------------------------------------------------------

// Values are taken relative to the first one of their channel: a mean far from
// zero then costs no digits when blocks are combined.
template <typename T>
DLKERNELS_INLINE void plane_moments(
    const Args& args, const T* x, const Item& item) {
  const float origin = load_one(x + item.offset);
  const auto count = static_cast<float>(args.area);
  const float shift =
      sum_of(
          args.area,
          [&](int64_t i, auto lanes) {
            return keep(load(x + item.offset + i, lanes) - origin, lanes);
          }) /
      count;
  *item.first = origin + shift;
  *item.second = sum_of(args.area, [&](int64_t i, auto lanes) {
    const Vec deviation = load(x + item.offset + i, lanes) - origin - shift;
    return keep(deviation * deviation, lanes);
  });
}

template <typename T>
DLKERNELS_INLINE void block_moments(
    const Args& args, const T* x, const Item& item) {
  const T* origin = x + item.sample * args.area * args.channels;
  const auto value = [&](int64_t row, int64_t c, auto lanes) {
    return load(x + item.offset + row * args.channels + c, lanes) -
           load(origin + c, lanes);
  };
  sum_columns(item.rows, args.channels, item.first, value);
  for_each_vec(args.channels, [&](int64_t c, auto lanes) {
    const Vec mean =
        load(item.first + c, lanes) / static_cast<float>(item.rows);
    store(item.first + c, mean, lanes);
  });
  sum_columns(
      item.rows,
      args.channels,
      item.second,
      [&](int64_t row, int64_t c, auto lanes) {
        const Vec deviation =
            value(row, c, lanes) - load(item.first + c, lanes);
        return deviation * deviation;
      });
}

void moments(const Args& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t i = begin; i < end; ++i) {
      const Item item = item_of(args, i);
      args.channels_last ? block_moments(args, x, item)
                         : plane_moments(args, x, item);
    }
  });
}

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
// computing sample variances" (1979), equation 2.1.
void combine_moments(const Args& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t n = begin; n < end; ++n) {
      const auto* origin = x + n * args.area * args.channels;
      float* means = args.first + n * args.channels;
      float* squares = args.second + n * args.channels;
      for_each_vec(args.channels, [&](int64_t c, auto lanes) {
        float count = 0.0f;
        Vec mean{};
        Vec square{};
        for (int64_t b = 0; b < args.blocks_per_sample; ++b) {
          const Item block = item_of(args, n * args.blocks_per_sample + b);
          const auto rows = static_cast<float>(block.rows);
          const float weight = rows / (count + rows);
          const Vec delta = load(block.first + c, lanes) - mean;
          mean += delta * weight;
          square +=
              load(block.second + c, lanes) + delta * delta * (count * weight);
          count += rows;
        }
        store(means + c, load(origin + c, lanes) + mean, lanes);
        store(squares + c, square, lanes);
      });
    }
  });
}

// ---- the sum ------------------------------------------------------------

void apply(const Args& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* x = static_cast<Pointer>(const_cast<void*>(args.x));
    const auto* shortcut =
        static_cast<Pointer>(const_cast<void*>(args.shortcut));
    auto* out = static_cast<Pointer>(args.out);
    for (int64_t i = begin; i < end; ++i) {
      for_each(
          args,
          item_of(args, i),
          [&](int64_t at, const auto& of, const auto& of_sample, auto lanes) {
            const Vec deviation = load(x + at, lanes) - of(args.mean, lanes);
            const Vec value = deviation * of_sample(args.slope, lanes) +
                              of_sample(args.offset, lanes) +
                              load(shortcut + at, lanes);
            store(out + at, args.relu ? Relu{}.value(value) : value, lanes);
          });
    }
  });
}

// ---- gradients ----------------------------------------------------------

// Calls body(tag, gradient), gradient(i, lanes) being grad_out where it counts.
template <typename Body>
DLKERNELS_INLINE void with_gradient(const Args& args, const Body& body) {
  dispatch(args.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* grad = static_cast<Pointer>(const_cast<void*>(args.grad_out));
    const auto* mask = static_cast<Pointer>(const_cast<void*>(args.mask));
    if (mask == nullptr) {
      body(tag, [=](int64_t i, auto lanes) { return load(grad + i, lanes); });
    } else {
      body(tag, [=](int64_t i, auto lanes) {
        const Vec value = load(grad + i, lanes);
        return load(mask + i, lanes) > 0.0f ? value : Vec{};
      });
    }
  });
}

void sums(const Args& args, int64_t begin, int64_t end) {
  with_gradient(args, [&](auto* tag, const auto& gradient) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(args.x));
    for (int64_t i = begin; i < end; ++i) {
      const Item item = item_of(args, i);
      if (args.channels_last) {
        sum_pairs_of_columns(
            item.rows,
            args.channels,
            item.first,
            item.second,
            [&](int64_t row, int64_t c, auto lanes) {
              const int64_t at = item.offset + row * args.channels + c;
              const Vec grad = gradient(at, lanes);
              const Vec deviation =
                  load(x + at, lanes) - load(args.mean + c, lanes);
              return VecPair{grad, grad * deviation};
            });
        continue;
      }
      const float mean = args.mean[item.channel];
      const Pair total = sum_pairs_of(args.area, [&](int64_t p, auto lanes) {
        const int64_t at = item.offset + p;
        const Vec grad = gradient(at, lanes);
        return VecPair{grad, grad * (load(x + at, lanes) - mean)};
      });
      *item.first = static_cast<float>(total.first);
      *item.second = static_cast<float>(total.second);
    }
  });
}

void combine_sums(const Args& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * args.blocks_per_sample;
    sum_pairs_of_columns(
        args.blocks_per_sample,
        args.channels,
        args.first + n * args.channels,
        args.second + n * args.channels,
        [&](int64_t block, int64_t c, auto lanes) {
          const Item item = item_of(args, first + block);
          return VecPair{
              load(item.first + c, lanes), load(item.second + c, lanes)};
        });
  }
}

void gradient(const Args& args, int64_t begin, int64_t end) {
  with_gradient(args, [&](auto* tag, const auto& gradient_at) {
    using Pointer = decltype(tag);
    const auto* x = static_cast<Pointer>(const_cast<void*>(args.x));
    auto* grad_x = static_cast<Pointer>(args.grad_x);
    auto* grad_shortcut = static_cast<Pointer>(args.grad_shortcut);
    for (int64_t i = begin; i < end; ++i) {
      for_each(
          args,
          item_of(args, i),
          [&](int64_t at, const auto& of, const auto& of_sample, auto lanes) {
            const Vec grad = gradient_at(at, lanes);
            const Vec deviation = load(x + at, lanes) - of(args.mean, lanes);
            const Vec value = grad * of_sample(args.slope, lanes) +
                              of_sample(args.offset, lanes) +
                              deviation * of(args.tilt, lanes);
            store(grad_x + at, value, lanes);
            if (grad_shortcut != nullptr) {
              store(grad_shortcut + at, grad, lanes);
            }
          });
    }
  });
}

}  // namespace

extern const ResidualSumKernels residual_sum_kernels = {
    moments,
    combine_moments,
    apply,
    sums,
    combine_sums,
    gradient,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
