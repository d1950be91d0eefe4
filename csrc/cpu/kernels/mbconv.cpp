#include "mbconv.h"

#include <type_traits>

#include "../batch_norm_channel.h"
#include "../depthwise.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

using Args = MbconvArgs;

// The functions of depthwise.h for one size of kernel and one stride.
struct Convolution {
  decltype(&convolve_plane<3, 1>) plane;
  decltype(&weight_gradient_of_rows<3, 1>) weight_gradient;
  decltype(&input_gradient_of_rows<3, 1>) input_gradient;
  decltype(&convolve_row_of_pixels<3, 1>) row_of_pixels;
  decltype(&weight_gradient_of_pixels<3, 1>) weight_gradient_of_pixels;
  decltype(&turn_taps_of_pixels<3, 1>) turn_taps;
  decltype(&input_gradient_of_row<3, 1>) input_gradient_of_row;
};

template <int K, int S>
Convolution convolution() {
  return {
      convolve_plane<K, S>,
      weight_gradient_of_rows<K, S>,
      input_gradient_of_rows<K, S>,
      convolve_row_of_pixels<K, S>,
      weight_gradient_of_pixels<K, S>,
      turn_taps_of_pixels<K, S>,
      input_gradient_of_row<K, S>};
}

Convolution convolution_of(const DepthwiseShape& shape) {
  return with_sizes(shape, [](auto kernel, auto stride) {
    return convolution<kernel.value, stride.value>();
  });
}

// Zeros around the outputs' gradient.
int64_t gradient_margin(const DepthwiseShape& shape) {
  return (shape.kernel - 1) / shape.stride + 1;
}

// ---- contiguous maps: the planes of a channel ---------------------------

struct ChannelScratch {
  Rows in;        // pre(x), padded
  Rows whole;     // the same before its columns are taken apart, under stride 2
  float* out;     // one plane of outputs
  Rows grad;      // of the outputs; data points to the first one
  Rows residues;  // of the input's gradient, columns taken apart
  float* grad_raw;  // of all samples
  float* grad_in;
  int64_t taken;

  ChannelScratch(const DepthwiseShape& shape, Scratch scratch, bool backward) {
    carve_forward(shape, scratch);
    if (backward) {
      carve_backward(shape, scratch);
    }
    taken = scratch.taken();
  }

 private:
  void carve_forward(const DepthwiseShape& shape, Scratch& scratch) {
    const int64_t half = round_up(columns_read(shape) / 2 + 1, kSlack) + kSlack;
    const int64_t stride = shape.stride == 2
                               ? 2 * half
                               : round_up(columns_read(shape), kSlack) + kSlack;
    in = {scratch.take(rows_read(shape) * stride), stride, half};
    if (shape.stride == 2) {
      const int64_t width =
          shape.pad_left + round_up(shape.width, kSlack) + 2 * half;
      whole = {scratch.take(shape.height * width), width, 0};
    }
    out = scratch.take(out_area_of(shape));
  }

  void carve_backward(const DepthwiseShape& shape, Scratch& scratch) {
    const int64_t margin = gradient_margin(shape);
    const int64_t grad_stride =
        round_up(shape.out_width + 2 * margin + 1, kSlack) + kSlack;
    float* first =
        scratch.take((shape.out_height + 2 * margin + 1) * grad_stride);
    grad = {first + margin * (grad_stride + 1), grad_stride, 0};

    const int64_t residue_half = round_up(shape.width / 2 + 1, kSlack);
    residues = {
        scratch.take(shape.height * 2 * residue_half),
        2 * residue_half,
        residue_half};
    grad_raw = scratch.take(shape.samples * out_area_of(shape));
    grad_in = scratch.take(shape.samples * area_of(shape) + 2 * kSlack);
  }
};

// Takes even and odd columns of a row apart.
DLKERNELS_INLINE void take_apart(
    const float* row, const Rows& in, int64_t pairs, float* target) {
  for (int64_t i = 0; i < pairs; i += kVecSize) {
    const Halves columns =
        deinterleave(load(row + 2 * i), load(row + 2 * i + kVecSize));
    store(target + i, columns.first);
    store(target + in.half + i, columns.second);
  }
}

// Fills the padded plane with pre(x).
template <typename T, typename Act>
DLKERNELS_NOINLINE void fill_plane(
    const Args& args,
    const ChannelScratch& scratch,
    const Act& act,
    int64_t n,
    int64_t c) {
  const DepthwiseShape& shape = args.shape;
  const T* x = static_cast<const T*>(args.pre.x) + plane_of(args.pre, n, c);
  const ChannelNorm norm(args.pre, c);
  const Rows& in = scratch.in;
  const int64_t fitting = rows_read(shape) - shape.pad_top;
  const int64_t height = fitting < shape.height ? fitting : shape.height;
  const int64_t pairs = (columns_read(shape) + 1) / 2;
  // All rows first: reading what was only just stored would wait for it.
  float* first = shape.stride == 1 ? in.data + shape.pad_top * in.stride
                                   : scratch.whole.data;
  const int64_t stride = shape.stride == 1 ? in.stride : scratch.whole.stride;
  for (int64_t y = 0; y < height; ++y) {
    const T* from = x + y * shape.width;
    float* row = first + y * stride + shape.pad_left;
    for_each_vec(shape.width, [&](int64_t i, auto lanes) {
      store(row + i, act.value(norm(load(from + i, lanes))), lanes);
    });
  }
  if (shape.stride == 2) {
    for (int64_t y = 0; y < height; ++y) {
      float* target = in.data + (y + shape.pad_top) * in.stride;
      take_apart(first + y * stride, in, pairs, target);
    }
  }
}

// The convolution's outputs of a channel of one sample, in scratch.out.
template <typename T>
void convolve_channel(
    const Args& args,
    const Convolution& convolution,
    const ChannelScratch& scratch,
    int64_t n,
    int64_t c) {
  const DepthwiseShape& shape = args.shape;
  with_nonlinearity(
      args.pre.activation, args.pre.negative_slope, [&](auto act) {
        fill_plane<T>(args, scratch, act, n, c);
      });
  convolution.plane(
      scratch.in,
      args.weight + c * shape.kernel * shape.kernel,
      shape.out_height,
      shape.out_width,
      scratch.out);
}

// post of the outputs in scratch.out.
template <typename T, typename Act>
DLKERNELS_NOINLINE void finish_plane(
    const Args& args,
    const ChannelScratch& scratch,
    const Act& act,
    int64_t n,
    int64_t c) {
  T* out = static_cast<T*>(args.post.out) + plane_of(args.post, n, c);
  const ChannelNorm norm(args.post, c);
  const float total = sum_of(args.post.area, [&](int64_t i, auto lanes) {
    const Vec value = act.value(norm(load(scratch.out + i, lanes)));
    store(out + i, value, lanes);
    return keep(value, lanes);
  });
  if (args.post.pooled != nullptr) {
    args.post.pooled[n * args.shape.channels + c] =
        total / static_cast<float>(args.post.area);
  }
}

void infer(const Args& args, float* memory, int64_t begin, int64_t end) {
  const ChannelScratch scratch(args.shape, Scratch(memory), false);
  const Convolution convolution = convolution_of(args.shape);
  specialize(args.post, [&](auto* tag, const auto& act) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / args.shape.channels;
      const int64_t c = item % args.shape.channels;
      convolve_channel<T>(args, convolution, scratch, n, c);
      finish_plane<T>(args, scratch, act, n, c);
    }
  });
}

void forward(const Args& args, float* memory, int64_t begin, int64_t end) {
  const ChannelScratch scratch(args.shape, Scratch(memory), false);
  const Convolution convolution = convolution_of(args.shape);
  specialize(args.post, [&](auto* tag, const auto& act) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* raw = static_cast<T*>(args.raw);
    for (int64_t c = begin; c < end; ++c) {
      if (args.has_pre) {
        settle_channel(args.pre, static_cast<const T*>(args.pre.x), c);
      }
      for (int64_t n = 0; n < args.shape.samples; ++n) {
        convolve_channel<T>(args, convolution, scratch, n, c);
        T* plane = raw + plane_of(args.post, n, c);
        for_each_vec(args.post.area, [&](int64_t i, auto lanes) {
          store(plane + i, load(scratch.out + i, lanes), lanes);
        });
      }
      settle_channel(args.post, raw, c);
      apply_to_channel(args.post, act, raw, c);
    }
  });
}

// channel_backward with the gradient of the norm's output kept in scratch
// memory, float32 planes of all samples, between its two passes.
template <typename T, typename Act, typename Read, typename Write>
DLKERNELS_INLINE void channel_backward_in_scratch(
    const BatchNormActArgs& args,
    const Act& act,
    const T* x,
    int64_t c,
    float* kept,
    const Read& grad_out,
    const Write& write) {
  const auto gradient = channel_gradient(args, act, x, c);
  const float mean = args.mean[c];
  channel_backward(
      args,
      c,
      [&](int64_t n, int64_t i, auto lanes) {
        const Gradient at = gradient(n, i, grad_out(n, i, lanes), lanes);
        store(kept + n * args.area + i, at.of_norm, lanes);
        return at;
      },
      [&](int64_t n, int64_t i, auto lanes) {
        const Vec value = load(x + plane_of(args, n, c) + i, lanes);
        return Gradient{load(kept + n * args.area + i, lanes), value - mean};
      },
      write);
}

// scratch.grad_raw from the gradient of post's output.
template <typename T, typename Act>
DLKERNELS_NOINLINE void post_backward(
    const Args& args,
    const ChannelScratch& scratch,
    const Act& act,
    int64_t c) {
  const BatchNormActArgs& post = args.post;
  const T* grad_out = static_cast<const T*>(post.grad_out);
  set_scale(post, c);
  channel_backward_in_scratch(
      post,
      act,
      static_cast<const T*>(args.raw),
      c,
      scratch.grad_raw,
      [&](int64_t n, int64_t i, auto lanes) {
        return load(grad_out + plane_of(post, n, c) + i, lanes);
      },
      [&](int64_t n, int64_t i, Vec grad, auto lanes) {
        store(scratch.grad_raw + n * post.area + i, grad, lanes);
      });
}

// The input's gradient from scratch.grad_in, that of pre's output.
template <typename T, typename Act>
DLKERNELS_NOINLINE void pre_backward(
    const Args& args,
    const ChannelScratch& scratch,
    const Act& act,
    int64_t c) {
  const BatchNormActArgs& pre = args.pre;
  T* grad_x = static_cast<T*>(pre.grad_x);
  const auto read = [&](int64_t n, int64_t i, auto lanes) {
    return load(scratch.grad_in + n * pre.area + i, lanes);
  };
  const auto write = [&](int64_t n, int64_t i, Vec grad, auto lanes) {
    store(grad_x + plane_of(pre, n, c) + i, grad, lanes);
  };
  if (args.has_pre) {
    channel_backward_in_scratch(
        pre,
        act,
        static_cast<const T*>(pre.x),
        c,
        scratch.grad_in,
        read,
        write);
    return;
  }
  for (int64_t n = 0; n < args.shape.samples; ++n) {
    for_each_vec(pre.area, [&](int64_t i, auto lanes) {
      write(n, i, read(n, i, lanes), lanes);
    });
  }
}

void pad_gradient(
    const DepthwiseShape& shape, const ChannelScratch& scratch, int64_t n) {
  const float* from = scratch.grad_raw + n * out_area_of(shape);
  for (int64_t y = 0; y < shape.out_height; ++y) {
    float* row = scratch.grad.data + y * scratch.grad.stride;
    for_each_vec(shape.out_width, [&](int64_t x, auto lanes) {
      store(row + x, load(from + y * shape.out_width + x, lanes), lanes);
    });
  }
}

template <typename T, typename Act>
void convolve_channel_backward(
    const Args& args,
    const Convolution& convolution,
    const ChannelScratch& scratch,
    const Act& act,
    int64_t c) {
  const DepthwiseShape& shape = args.shape;
  const int64_t taps = shape.kernel * shape.kernel;
  double grad_weight[7 * 7] = {};
  for (int64_t n = 0; n < shape.samples; ++n) {
    fill_plane<T>(args, scratch, act, n, c);
    pad_gradient(shape, scratch, n);
    convolution.weight_gradient(
        scratch.in,
        scratch.grad,
        shape.out_height,
        shape.out_width,
        grad_weight);
    convolution.input_gradient(
        shape,
        scratch.grad,
        scratch.residues,
        args.weight + c * taps,
        scratch.grad_in + n * area_of(shape));
  }
  for (int64_t k = 0; k < taps; ++k) {
    args.grad_weight[c * taps + k] = static_cast<float>(grad_weight[k]);
  }
}

void backward(const Args& args, float* memory, int64_t begin, int64_t end) {
  const ChannelScratch scratch(args.shape, Scratch(memory), true);
  const Convolution convolution = convolution_of(args.shape);
  for (int64_t c = begin; c < end; ++c) {
    specialize(args.post, [&](auto* tag, const auto& act) {
      post_backward<std::remove_pointer_t<decltype(tag)>>(
          args, scratch, act, c);
    });
    specialize(args.pre, [&](auto* tag, const auto& act) {
      using T = std::remove_pointer_t<decltype(tag)>;
      set_scale(args.pre, c);
      convolve_channel_backward<T>(args, convolution, scratch, act, c);
      pre_backward<T>(args, scratch, act, c);
    });
  }
}

// ---- channels_last maps: a group of channels of one sample --------------

// Rows of the outputs' gradient that a row of the input's needs beside the last
// of them.
int64_t earlier_rows(const DepthwiseShape& shape) {
  return (shape.kernel - 1) / shape.stride;
}

// Of the first-level cache, beside what else is at work.
constexpr int64_t kRingFloats = 6144;

struct GroupScratch {
  int64_t band;  // rows of outputs that are worked on together
  Pixels in;     // pre(x) for them, padded
  Pixels grad;   // of them, padded; data points to the first pixel of a row
  float* row;    // of outputs, or of the input's gradient
  const float* weight;  // [kernel * kernel, kGroup]
  float* turned;        // the same, as the input's gradient needs them

  int64_t taken;

  GroupScratch(const DepthwiseShape& shape, Scratch scratch, bool backward)
      : weight(nullptr) {
    in = take_ring(shape, kRingFloats, scratch);
    band = band_of(shape, in);
    if (backward) {
      const int64_t margin = gradient_margin(shape);
      const int64_t stride = (shape.out_width + 2 * margin + 1) * kGroup;
      int64_t grads = 1;
      while (grads < band + earlier_rows(shape)) {
        grads *= 2;
      }
      grad = {
          scratch.take(grads * stride) + margin * kGroup, stride, grads - 1};
    }
    const int64_t longer =
        shape.width < shape.out_width ? shape.out_width : shape.width;
    row = scratch.take(longer * kGroup);
    turned = scratch.take(shape.kernel * shape.kernel * kGroup);
    taken = scratch.taken();
  }

  // This scratch memory from a part of the pixels on.
  GroupScratch from(int64_t part) const {
    GroupScratch moved = *this;
    moved.in.data += part;
    moved.grad.data += part;
    moved.row += part;
    moved.weight += part;
    moved.turned += part;
    return moved;
  }
};

struct Group {
  int64_t sample;
  int64_t channel;  // the first one
};

Group group_of(const DepthwiseShape& shape, int64_t item) {
  const int64_t groups = (shape.channels + kGroup - 1) / kGroup;
  return {item / groups, item % groups * kGroup};
}

const float* weights_of(const Args& args, const Group& group) {
  return args.weight + group.channel * args.shape.kernel * args.shape.kernel;
}

// Calls body(part, lanes) for the vectors that make up the group's channels.
template <typename Body>
DLKERNELS_INLINE void for_each_part(
    const DepthwiseShape& shape, const Group& group, const Body& body) {
  const int64_t rest = shape.channels - group.channel;
  for_each_vec(rest < kGroup ? rest : kGroup, body);
}

// The norm of some channels of channels_last maps.
template <typename Lanes>
struct ChannelsNorm {
  Vec mean;
  Vec scale;
  Vec bias;

  DLKERNELS_MEMBER ChannelsNorm(
      const BatchNormActArgs& args, int64_t c, Lanes lanes)
      : mean(load(args.mean + c, lanes)),
        scale(load(args.scale + c, lanes)),
        bias(load(args.bias + c, lanes)) {}

  DLKERNELS_MEMBER Vec operator()(Vec x) const {
    return (x - mean) * scale + bias;
  }
};

// The vector of channels from c on that a pass over a group works on.
template <typename Lanes>
struct Part {
  int64_t sample;
  int64_t c;
  Lanes lanes;
};

// Pixels of channels_last maps lie apart, where hardware does not prefetch.
template <typename T>
DLKERNELS_INLINE void prefetch_pixel(const T* pixel) {
  __builtin_prefetch(pixel, /*rw=*/0, /*locality=*/2);
}

// Fills the padded rows that a band reads with pre(x), but for those that it
// shares with the one before.
template <typename T, typename Act, typename Lanes>
DLKERNELS_NOINLINE void fill_pixels(
    const Args& args,
    const GroupScratch& scratch,
    const Act& act,
    const Part<Lanes>& part,
    const Band& band) {
  const DepthwiseShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const T* x = static_cast<const T*>(args.pre.x) +
               part.sample * area_of(shape) * channels + part.c;
  const ChannelsNorm norm(args.pre, part.c, part.lanes);
  const int64_t fitting = columns_read(shape) - shape.pad_left;
  const int64_t width = fitting < shape.width ? fitting : shape.width;
  const int64_t shared = shared_rows(shape);
  const int64_t begin =
      band.first == 0 ? 0 : band.first * shape.stride + shared;
  const int64_t end = band.end() * shape.stride + shared;
  for (int64_t i = begin; i < end; ++i) {
    float* row = scratch.in.at(i, shape.pad_left);
    const int64_t y = i - shape.pad_top;
    if (y < 0 || y >= shape.height) {
      clear_pixels(row, width);
      continue;
    }
    const T* from = x + y * shape.width * channels;
    const int64_t ahead = y + 1 < shape.height ? shape.width * channels : 0;
    for (int64_t j = 0; j < width; ++j) {
      prefetch_pixel(from + ahead);
      store(row, act.value(norm(load(from, part.lanes))));
      from += channels;
      row += kGroup;
    }
  }
}

// Writes post of each row of a band and adds their sums to those of the group.
template <typename T, typename Act, typename Lanes>
DLKERNELS_NOINLINE void finish_pixels(
    const Args& args,
    const Convolution& convolution,
    const GroupScratch& scratch,
    const Act& act,
    const Part<Lanes>& part,
    const Band& band,
    float* sums) {
  const DepthwiseShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const int64_t width = shape.out_width;
  const ChannelsNorm norm(args.post, part.c, part.lanes);
  const int64_t first = part.sample * shape.out_height + band.first;
  T* out = static_cast<T*>(args.post.out) + first * width * channels + part.c;
  Vec total = load(sums);
  for (int64_t y = band.first; y < band.end(); ++y) {
    convolution.row_of_pixels(
        scratch.in, scratch.weight, y, width, scratch.row);
    const float* from = scratch.row;
    Vec row{};
    for (int64_t x = 0; x < width; ++x) {
      const Vec value = act.value(norm(load(from)));
      store(out, value, part.lanes);
      out += channels;
      from += kGroup;
      row += value;
    }
    total += row;
  }
  store(sums, total);
}

// Calls body(first channel, scratch, part, band) for the parts of each band of
// a group, of which pre(x) has been put in place.
template <typename Body>
DLKERNELS_INLINE void for_each_filled_part(
    const Args& args,
    GroupScratch whole,
    const Group& group,
    const Body& body) {
  const DepthwiseShape& shape = args.shape;
  whole.weight = weights_of(args, group);
  for (int64_t y = 0; y < shape.out_height; y += whole.band) {
    const int64_t rest = shape.out_height - y;
    const Band band{y, rest < whole.band ? rest : whole.band};
    for_each_part(shape, group, [&](int64_t first, auto lanes) {
      const GroupScratch scratch = whole.from(first);
      const Part<decltype(lanes)> part{
          group.sample, group.channel + first, lanes};
      specialize(args.pre, [&](auto* tag, const auto& act) {
        fill_pixels<std::remove_pointer_t<decltype(tag)>>(
            args, scratch, act, part, band);
      });
      body(first, scratch, part, band);
    });
  }
}

void infer_last(const Args& args, float* memory, int64_t begin, int64_t end) {
  const DepthwiseShape& shape = args.shape;
  const GroupScratch scratch(shape, Scratch(memory), false);
  const Convolution convolution = convolution_of(shape);
  for (int64_t item = begin; item < end; ++item) {
    const Group group = group_of(shape, item);
    float sums[kGroup] = {};
    for_each_filled_part(
        args,
        scratch,
        group,
        [&](int64_t first,
            const GroupScratch& filled,
            const auto& part,
            const Band& band) {
          specialize(args.post, [&](auto* tag, const auto& act) {
            finish_pixels<std::remove_pointer_t<decltype(tag)>>(
                args, convolution, filled, act, part, band, sums + first);
          });
        });
    if (args.post.pooled != nullptr) {
      float* pooled =
          args.post.pooled + group.sample * shape.channels + group.channel;
      for_each_part(shape, group, [&](int64_t first, auto lanes) {
        const Vec mean =
            load(sums + first) / static_cast<float>(args.post.area);
        store(pooled + first, mean, lanes);
      });
    }
  }
}

template <typename T, typename Lanes>
DLKERNELS_INLINE void store_row(
    const float* row, int64_t width, int64_t channels, T* out, Lanes lanes) {
  for (int64_t x = 0; x < width; ++x) {
    store(out, load(row), lanes);
    row += kGroup;
    out += channels;
  }
}

void convolve_last(
    const Args& args, float* memory, int64_t begin, int64_t end) {
  const DepthwiseShape& shape = args.shape;
  const GroupScratch scratch(shape, Scratch(memory), false);
  const Convolution convolution = convolution_of(shape);
  const auto convolve = [&](int64_t,
                            const GroupScratch& filled,
                            const auto& part,
                            const Band& band) {
    dispatch(shape.dtype, [&](auto* tag) {
      auto* raw = static_cast<decltype(tag)>(args.raw) + part.c;
      for (int64_t y = band.first; y < band.end(); ++y) {
        convolution.row_of_pixels(
            filled.in, filled.weight, y, shape.out_width, filled.row);
        const int64_t row = part.sample * shape.out_height + y;
        store_row(
            filled.row,
            shape.out_width,
            shape.channels,
            raw + row * shape.out_width * shape.channels,
            part.lanes);
      }
    });
  };
  for (int64_t item = begin; item < end; ++item) {
    for_each_filled_part(args, scratch, group_of(shape, item), convolve);
  }
}

// The gradient of a band of raw.
template <typename T, typename Act, typename Lanes>
DLKERNELS_NOINLINE void fill_gradient(
    const Args& args,
    const GroupScratch& scratch,
    const Act& act,
    const Part<Lanes>& part,
    const Band& band) {
  const DepthwiseShape& shape = args.shape;
  const BatchNormActArgs& post = args.post;
  const int64_t channels = shape.channels;
  const int64_t first = part.sample * out_area_of(shape) * channels + part.c;
  const T* raw = static_cast<const T*>(args.raw) + first;
  const T* grad_out = static_cast<const T*>(post.grad_out) + first;
  const ChannelsNorm norm(post, part.c, part.lanes);
  const Vec shift = load(post.partial + part.c, part.lanes);
  const Vec slope = load(post.partial + channels + part.c, part.lanes);
  Vec pooled{};
  if (post.grad_pooled != nullptr) {
    const float* of = post.grad_pooled + part.sample * channels + part.c;
    pooled = load(of, part.lanes) / static_cast<float>(post.area);
  }
  for (int64_t y = band.first; y < band.end(); ++y) {
    float* row = scratch.grad.at(y, 0);
    int64_t i = y * shape.out_width * channels;
    const int64_t ahead =
        y + 1 < shape.out_height ? shape.out_width * channels : 0;
    for (int64_t x = 0; x < shape.out_width; ++x) {
      prefetch_pixel(raw + i + ahead);
      prefetch_pixel(grad_out + i + ahead);
      const Vec value = load(raw + i, part.lanes);
      const Vec grad =
          (load(grad_out + i, part.lanes) + pooled) * act.slope(norm(value));
      const Vec deviation = value - norm.mean;
      store(row, norm.scale * (grad - shift - deviation * slope));
      i += channels;
      row += kGroup;
    }
  }
}

// The rows of the input that the outputs' rows up to `end` complete, and those
// up to `begin` did not.
Band completed_rows(const DepthwiseShape& shape, int64_t begin, int64_t end) {
  const auto row_of = [&](int64_t output) {
    const int64_t y = output * shape.stride - shape.pad_top;
    return y < 0 ? 0 : y < shape.height ? y : shape.height;
  };
  return {row_of(begin), row_of(end) - row_of(begin)};
}

// Writes a row of the gradient of the norm before the convolution, from that of
// the activation after it, and adds it to the sums that the norm's gradients
// take.
template <typename T, typename Act, typename Lanes>
DLKERNELS_NOINLINE void write_norm_gradient(
    const Args& args,
    const Act& act,
    const float* row,
    int64_t first,
    const Part<Lanes>& part) {
  const int64_t channels = args.shape.channels;
  const T* x = static_cast<const T*>(args.pre.x) + first;
  T* grad_x = static_cast<T*>(args.pre.grad_x) + first;
  const ChannelsNorm norm(args.pre, part.c, part.lanes);
  VecPair total{};
  for (int64_t i = 0; i < args.shape.width; ++i) {
    const Vec value = load(x, part.lanes);
    const Vec grad = load(row) * act.slope(norm(value));
    store(grad_x, grad, part.lanes);
    total.first += grad;
    total.second += grad * (value - norm.mean);
    x += channels;
    grad_x += channels;
    row += kGroup;
  }
  float* sums = args.pre.partial + 2 * part.sample * channels + part.c;
  store(sums, load(sums, part.lanes) + total.first, part.lanes);
  sums += channels;
  store(sums, load(sums, part.lanes) + total.second, part.lanes);
}

// Writes rows of the gradient of the input, or of the norm before it.
template <typename T, typename Lanes>
void write_input_gradient(
    const Args& args,
    const Convolution& convolution,
    const GroupScratch& scratch,
    const Part<Lanes>& part,
    const Band& rows) {
  const DepthwiseShape& shape = args.shape;
  const int64_t pitch = shape.width * shape.channels;
  for (int64_t y = rows.first; y < rows.end(); ++y) {
    const int64_t first = (part.sample * shape.height + y) * pitch + part.c;
    convolution.input_gradient_of_row(
        shape, scratch.grad, scratch.turned, y, scratch.row);
    if (!args.has_pre) {
      T* grad_x = static_cast<T*>(args.pre.grad_x) + first;
      store_row(scratch.row, shape.width, shape.channels, grad_x, part.lanes);
      continue;
    }
    with_nonlinearity(
        args.pre.activation, args.pre.negative_slope, [&](auto act) {
          write_norm_gradient<T>(args, act, scratch.row, first, part);
        });
  }
}

// The outputs' rows above the first band are zeros, as are those below the
// last one, which the input's last rows wait for.
template <typename T, typename Lanes>
void convolve_band_backward(
    const Args& args,
    const Convolution& convolution,
    const GroupScratch& scratch,
    const Part<Lanes>& part,
    const Band& band,
    float* grad_weight) {
  const DepthwiseShape& shape = args.shape;
  const auto clear_row = [&](int64_t y) {
    clear_pixels(scratch.grad.at(y, 0), shape.out_width);
  };
  if (band.first == 0) {
    for (int64_t y = -earlier_rows(shape); y < 0; ++y) {
      clear_row(y);
    }
  }
  specialize(args.post, [&](auto* tag, const auto& act) {
    fill_gradient<std::remove_pointer_t<decltype(tag)>>(
        args, scratch, act, part, band);
  });
  convolution.weight_gradient_of_pixels(
      scratch.in,
      scratch.grad,
      band.first,
      band.end(),
      shape.out_width,
      grad_weight);
  Band rows = completed_rows(shape, band.first, band.end());
  write_input_gradient<T>(args, convolution, scratch, part, rows);
  for (int64_t y = band.end();
       band.end() == shape.out_height && rows.end() < shape.height;
       ++y) {
    clear_row(y);
    rows = completed_rows(shape, y, y + 1);
    write_input_gradient<T>(args, convolution, scratch, part, rows);
  }
}

void clear_sums(const Args& args, const Group& group) {
  const int64_t channels = args.shape.channels;
  float* sums = args.pre.partial + 2 * group.sample * channels + group.channel;
  for_each_part(args.shape, group, [&](int64_t first, auto lanes) {
    store(sums + first, Vec{}, lanes);
    store(sums + channels + first, Vec{}, lanes);
  });
}

void convolve_last_backward(
    const Args& args, float* memory, int64_t begin, int64_t end) {
  const DepthwiseShape& shape = args.shape;
  const GroupScratch scratch(shape, Scratch(memory), true);
  const Convolution convolution = convolution_of(shape);
  const int64_t weights = shape.kernel * shape.kernel * kGroup;
  float* grad_weight = nullptr;
  const auto convolve = [&](int64_t first,
                            const GroupScratch& filled,
                            const auto& part,
                            const Band& band) {
    dispatch(shape.dtype, [&](auto* tag) {
      convolve_band_backward<std::remove_pointer_t<decltype(tag)>>(
          args, convolution, filled, part, band, grad_weight + first);
    });
  };
  for (int64_t item = begin; item < end; ++item) {
    grad_weight = args.grad_weight + item * weights;
    for (int64_t i = 0; i < weights; ++i) {
      grad_weight[i] = 0.0f;
    }
    const Group group = group_of(shape, item);
    if (args.has_pre) {
      clear_sums(args, group);
    }
    convolution.turn_taps(weights_of(args, group), scratch.turned);
    for_each_filled_part(args, scratch, group, convolve);
  }
}

int64_t scratch_floats(
    const DepthwiseShape& shape, bool channels_last, bool backward) {
  const Scratch counter(nullptr);
  return channels_last ? GroupScratch(shape, counter, backward).taken
                       : ChannelScratch(shape, counter, backward).taken;
}

}  // namespace

extern const MbconvKernels mbconv_kernels = {
    scratch_floats,
    infer,
    infer_last,
    forward,
    backward,
    convolve_last,
    convolve_last_backward,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
