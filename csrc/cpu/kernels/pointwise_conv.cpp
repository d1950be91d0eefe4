#include "pointwise_conv.h"

#include "../nonlinearity.h"
#include "../tile.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// Fills a block with values of the tile, make(value, channel, lanes) of each.
template <typename T, typename Make>
DLKERNELS_INLINE void load_tile(
    const Slice& in,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block,
    const Make& make) {
  for_each_run(tile, false, [&](const Run& run) {
    float* to = block + run.position * kPitch;
    read_run<T>(
        in,
        tile.tiling.grid,
        run,
        first,
        count,
        [&](int64_t i, int64_t c, Vec x, auto lanes) {
          store(to + i * kPitch + c, make(x, first + c, lanes));
        });
  });
}

template <typename T>
DLKERNELS_NOINLINE void load_plain(
    const Slice& in,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  load_tile<T>(
      in, tile, first, count, block, [](Vec x, int64_t, auto) { return x; });
}

void load_block(
    const Slice& in,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  dispatch(in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    load_plain<T>(in, tile, first, count, block);
  });
}

template <typename T, typename Act>
DLKERNELS_NOINLINE void load_activated(
    const PointwiseConvBackwardArgs& args,
    const Act& act,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  load_tile<T>(
      args.in,
      tile,
      first,
      count,
      block,
      [&](Vec x, int64_t channel, auto lanes) {
        return act.value(apply(args.norm, channel, x, lanes));
      });
}

// The convolution's input, but for the gates.
void load_input(
    const PointwiseConvBackwardArgs& args,
    const Tile& tile,
    int64_t first,
    int64_t count,
    float* block) {
  if (args.norm.mean == nullptr) {
    load_block(args.in, tile, first, count, block);
    return;
  }
  dispatch(args.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    with_nonlinearity(args.activation, 0.0f, [&](auto act) {
      load_activated<T>(args, act, tile, first, count, block);
    });
  });
}

int64_t sample_of(const Tile& tile) {
  const Grid& grid = tile.tiling.grid;
  return tile.first / (grid.height * grid.width);
}

// Multiplies a block of a tile of one sample by its gates.
void apply_gate(
    const float* gate, int64_t pixels, int64_t count, float* block) {
  for_each_vec(count, [&](int64_t c, auto lanes) {
    const Vec factor = load(gate + c, lanes);
    for (int64_t i = 0; i < pixels; ++i) {
      float* at = block + i * kPitch + c;
      store(at, load(at) * factor);
    }
  });
}

// Multiplies both the inputs and the gradients of what the gates made of them
// by the gates, and gives the gradients of the gates unless grad_gate is null.
void gate_backward(
    const float* gate,
    int64_t pixels,
    int64_t count,
    float* input,
    float* grad,
    float* grad_gate) {
  for_each_vec(count, [&](int64_t c, auto lanes) {
    const Vec factor = load(gate + c, lanes);
    Vec total[2] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      float* x = input + i * kPitch + c;
      float* g = grad + i * kPitch + c;
      const Vec value = load(x), slope = load(g);
      total[i % 2] += value * slope;
      store(x, value * factor);
      store(g, slope * factor);
    }
    if (grad_gate != nullptr) {
      store(grad_gate + c, total[0] + total[1], lanes);
    }
  });
}

// Calls body(first channel, number of channels) for each block.
template <typename Body>
DLKERNELS_INLINE void for_each_block(int64_t channels, const Body& body) {
  for (int64_t first = 0; first < channels; first += kBlock) {
    body(first, smaller(kBlock, channels - first));
  }
}

// Blocks of a tile, [pixels, pitch] each, in scratch memory or in the maps.
struct Blocks {
  float* data;
  int64_t step;  // from block to block; 0 where one serves block after block
  int64_t pitch;

  DLKERNELS_MEMBER float* of(int64_t channel) const {
    return data + channel / kBlock * step;
  }
};

// Whether a tile's results may be written to the maps as a product gives them:
// pixel by pixel, in groups of channels.
DLKERNELS_INLINE bool holds_products(const Slice& out) {
  return out.channels_last && out.dtype == ScalarType::Float &&
         out.count % kChannelGroup == 0;
}

// The blocks that a tile's results are computed in: those of the maps if they
// can hold them.
DLKERNELS_INLINE Blocks
results_of(const Slice& out, const Tile& tile, float* scratch, int64_t step) {
  if (!holds_products(out)) {
    return {scratch, step, kPitch};
  }
  float* first = static_cast<float*>(out.data) + tile.first * out.channels;
  return {first, kBlock, out.channels};
}

void forward(
    const PointwiseConvArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t inputs = args.in.count, outputs = args.out.count;
  const bool keeps = keeps_inputs(inputs, outputs);
  const int64_t size = tile_length(args.tiling) * kPitch;
  const Blocks input{scratch, keeps ? size : 0, kPitch};
  float* const rest = scratch + (keeps ? block_count(inputs) : 1) * size;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(args.tiling, index);
    const Blocks output = results_of(args.out, tile, rest, keeps ? 0 : size);
    const auto read = [&](int64_t in, int64_t count) {
      load_block(args.in, tile, in, count, input.of(in));
      if (args.gate != nullptr) {
        const float* gate = args.gate + sample_of(tile) * inputs + in;
        apply_gate(gate, tile.count, count, input.of(in));
      }
    };
    const auto write = [&](int64_t out, int64_t count) {
      if (!holds_products(args.out)) {
        write_block(args.out, tile, out, count, output.of(out));
      }
    };
    const auto add =
        [&](int64_t in, int64_t depth, int64_t out, int64_t count) {
          const int64_t columns = padded_channels(count);
          multiply<false>(
              {tile.count,
               depth,
               columns,
               input.of(in),
               args.weight + packed_offset(inputs, in, out, columns),
               0,
               output.of(out),
               output.pitch,
               in > 0});
        };
    if (keeps) {
      for_each_block(inputs, read);
      for_each_block(outputs, [&](int64_t out, int64_t count) {
        for_each_block(inputs, [&](int64_t in, int64_t depth) {
          add(in, depth, out, count);
        });
        write(out, count);
      });
    } else {
      for_each_block(inputs, [&](int64_t in, int64_t depth) {
        read(in, depth);
        for_each_block(outputs, [&](int64_t out, int64_t count) {
          add(in, depth, out, count);
        });
      });
      for_each_block(outputs, write);
    }
  }
}

// Backward of one tile.
class TileBackward {
 public:
  TileBackward(
      const PointwiseConvBackwardArgs& args,
      float* grad_weight,
      float* scratch,
      int64_t index)
      : args_(args),
        tile_(tile_at(args.tiling, index)),
        index_(index),
        inputs_(args.in.count),
        outputs_(args.grad_out.count),
        grad_weight_(grad_weight) {
    const int64_t size = tile_length(args.tiling) * kPitch;
    // The gradients of gates come before those of weights, which takes the
    // gradients of all outputs.
    keeps_inputs_ = args.gate == nullptr && keeps_inputs(inputs_, outputs_);
    const int64_t kept = keeps_inputs_ ? block_count(inputs_) : 1;
    const int64_t step = keeps_inputs_ ? size : 0;
    input_ = {scratch, step, kPitch};
    float* const results = scratch + kept * size;
    grad_input_ = is_direct() ? results_of(args.grad_in, tile_, results, step)
                              : Blocks{results, step, kPitch};
    grad_output_ = {results + kept * size, keeps_inputs_ ? 0 : size, kPitch};
  }

  void run() const {
    keeps_inputs_ ? by_outputs() : by_inputs();
  }

 private:
  void by_outputs() const {
    for_each_block(inputs_, [&](int64_t in, int64_t width) {
      load_input(args_, tile_, in, width, input_.of(in));
    });
    for_each_block(outputs_, [&](int64_t out, int64_t depth) {
      load_block(args_.grad_out, tile_, out, depth, grad_output_.of(out));
      for_each_block(inputs_, [&](int64_t in, int64_t width) {
        add_to_input(in, width, out, depth);
        add_to_weight(in, width, out, depth);
      });
    });
    for_each_block(
        inputs_, [&](int64_t in, int64_t width) { write(in, width); });
  }

  void by_inputs() const {
    for_each_block(outputs_, [&](int64_t out, int64_t depth) {
      load_block(args_.grad_out, tile_, out, depth, grad_output_.of(out));
    });
    for_each_block(inputs_, [&](int64_t in, int64_t width) {
      load_input(args_, tile_, in, width, input_.of(in));
      for_each_block(outputs_, [&](int64_t out, int64_t depth) {
        add_to_input(in, width, out, depth);
      });
      if (args_.gate != nullptr) {
        gate_backward(
            args_.gate + sample_of(tile_) * inputs_ + in,
            tile_.count,
            width,
            input_.of(in),
            grad_input_.of(in),
            args_.grad_gate == nullptr
                ? nullptr
                : args_.grad_gate + index_ * inputs_ + in);
      }
      write(in, width);
      for_each_block(outputs_, [&](int64_t out, int64_t depth) {
        add_to_weight(in, width, out, depth);
      });
    });
  }

  // Whether the gradient of the input is computed where it belongs.
  bool is_direct() const {
    return args_.grad_in.data != nullptr && args_.gate == nullptr &&
           holds_products(args_.grad_in);
  }

  void write(int64_t in, int64_t width) const {
    if (args_.grad_in.data != nullptr && !is_direct()) {
      write_block(args_.grad_in, tile_, in, width, grad_input_.of(in));
    }
  }

  void add_to_input(
      int64_t in, int64_t width, int64_t out, int64_t depth) const {
    if (args_.grad_in.data == nullptr && args_.grad_gate == nullptr) {
      return;
    }
    const int64_t columns = padded_channels(width);
    multiply<false>(
        {tile_.count,
         depth,
         columns,
         grad_output_.of(out),
         args_.weight + packed_offset(outputs_, out, in, columns),
         0,
         grad_input_.of(in),
         grad_input_.pitch,
         out > 0});
  }

  void add_to_weight(
      int64_t in, int64_t width, int64_t out, int64_t depth) const {
    if (grad_weight_ == nullptr) {
      return;
    }
    const int64_t pitch = padded_channels(outputs_);
    multiply<true>(
        {width,
         tile_.count,
         padded_channels(depth),
         input_.of(in),
         grad_output_.of(out),
         kPitch,
         grad_weight_ + in * pitch + out,
         pitch,
         true});
  }

  const PointwiseConvBackwardArgs& args_;
  const Tile tile_;
  const int64_t index_;
  const int64_t inputs_;
  const int64_t outputs_;
  float* const grad_weight_;
  bool keeps_inputs_;
  Blocks input_;
  Blocks grad_input_;
  Blocks grad_output_;
};

void backward(
    const PointwiseConvBackwardArgs& args,
    float* grad_weight,
    float* scratch,
    int64_t begin,
    int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    TileBackward(args, grad_weight, scratch, index).run();
  }
}

void pack(const PackWeightArgs& args, int64_t begin, int64_t end) {
  pack_weight(args, begin * kChannelGroup, end * kChannelGroup);
}

void unpack(const UnpackWeightArgs& args, int64_t begin, int64_t end) {
  unpack_weight(
      args, begin * kChannelGroup, smaller(end * kChannelGroup, args.out));
}

}  // namespace

extern const PointwiseConvKernels pointwise_conv_kernels = {
    pack,
    unpack,
    forward,
    backward,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
