#include "kernels/conv3x3.h"

#include <tuple>
#include <vector>

#include "../include/tensor.h"

namespace dlkernels {
namespace {

// Of the transformed maps of a block of tiles, for the gradient of the weight.
constexpr int64_t kBlockFloats = 1 << 20;
constexpr int64_t kMaxTiles = 512;

Conv3x3Shape shape_of(
    const Tensor& x,
    const Tensor& weight,
    int64_t padding,
    MemoryFormat format) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape [N, C, H, W]");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
          weight.size(3) == 3 && weight.scalar_type() == x.scalar_type(),
      "weight must have shape [O, C, 3, 3] and the dtype of x");
  STD_TORCH_CHECK(0 <= padding && padding <= 2, "padding must be 0, 1 or 2");
  const Conv3x3Shape shape{
      scalar_type_of(x, "x"),
      format == MemoryFormat::ChannelsLast,
      x.size(0),
      x.size(1),
      weight.size(0),
      x.size(2),
      x.size(3),
      padding};
  STD_TORCH_CHECK(
      shape.height > 0 && shape.width > 0 && shape.out_height() > 0 &&
          shape.out_width() > 0,
      "the kernel must not be larger than the padded maps");
  return shape;
}

Tensor empty_of(
    const Tensor& like, const Conv3x3Shape& shape, MemoryFormat format) {
  const std::array<int64_t, 4> sizes{
      shape.samples, shape.out_channels, shape.out_height(), shape.out_width()};
  return torch::stable::empty(
      sizes,
      like.scalar_type(),
      std::nullopt,
      like.device(),
      std::nullopt,
      format);
}

Tensor pack(const Tensor& weight_, const Conv3x3Shape& shape, bool turned) {
  const Conv3x3Kernels& kernels = conv3x3_kernels();
  const MemoryFormat format = memory_format_of(weight_);
  const Tensor weight = in_format(weight_, format);
  const int64_t panels = ceil_div(shape.out_channels, kernels.panel);
  Tensor packed = empty_float(
      weight, {panels, kElements, shape.in_channels, kernels.panel});
  const PackConv3x3Args args{
      shape.dtype,
      format == MemoryFormat::ChannelsLast,
      shape.in_channels,
      shape.out_channels,
      turned,
      weight.const_data_ptr(),
      packed.mutable_data_ptr<float>()};
  parallel_for(
      panels,
      kElements * shape.in_channels * kernels.panel,
      [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  return packed;
}

// Where there are fewer groups of tiles than threads, the threads share the
// output channels, too.
void run(const Conv3x3Args& args, const Tensor& like) {
  const Conv3x3Kernels& kernels = conv3x3_kernels();
  const Conv3x3Shape& shape = args.shape;
  const int64_t groups = ceil_div(shape.tiles(), kernels.group);
  const int64_t panels = ceil_div(shape.out_channels, kernels.panel);
  if (groups == 0 || panels == 0) {
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t strips = std::min(groups, threads);
  const int64_t parts = std::min(panels, threads / strips);
  const int64_t floats = kernels.scratch_floats(shape);
  Tensor memory = empty_float(like, {strips * parts, floats});
  float* scratch = memory.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, strips * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t strip = item / parts, part = item % parts;
          kernels.forward(
              args,
              scratch + item * floats,
              part * panels / parts,
              (part + 1) * panels / parts,
              strip * groups / strips,
              (strip + 1) * groups / strips);
        }
      });
}

Tensor conv3x3(
    const Tensor& x_,
    const Tensor& weight,
    const std::optional<Tensor>& bias_,
    int64_t padding) {
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Conv3x3Shape shape = shape_of(x, weight, padding, format);
  STD_TORCH_CHECK(
      !bias_ || (bias_->dim() == 1 && bias_->size(0) == shape.out_channels &&
                 bias_->scalar_type() == x.scalar_type()),
      "bias must have one value per output channel and the dtype of x");
  const auto bias = as_contiguous(bias_);
  const Tensor packed = pack(weight, shape, false);
  Tensor out = empty_of(x, shape, format);
  run({shape,
       x.const_data_ptr(),
       packed.const_data_ptr<float>(),
       data_or_null(bias),
       out.mutable_data_ptr()},
      x);
  return out;
}

// A convolution of grad_out with turned kernels, padded by what the kernel
// lacks of a whole overlap.
Tensor input_gradient(
    const Conv3x3Shape& shape,
    const Tensor& grad_out,
    const Tensor& weight,
    MemoryFormat format) {
  const Conv3x3Shape turned{
      shape.dtype,
      shape.channels_last,
      shape.samples,
      shape.out_channels,
      shape.in_channels,
      shape.out_height(),
      shape.out_width(),
      2 - shape.padding};
  const Tensor packed = pack(weight, turned, true);
  Tensor grad_x = empty_of(grad_out, turned, format);
  run({turned,
       grad_out.const_data_ptr(),
       packed.const_data_ptr<float>(),
       nullptr,
       grad_x.mutable_data_ptr()},
      grad_out);
  return grad_x;
}

Tensor weight_gradient(
    const Conv3x3Shape& shape, const Tensor& grad_out, const Tensor& x) {
  const Conv3x3Kernels& kernels = conv3x3_kernels();
  Tensor grad_weight = torch::stable::new_zeros(
      x, {shape.out_channels, shape.in_channels, 3, 3});
  const int64_t tiles = shape.tiles();
  const int64_t panels = ceil_div(shape.out_channels, kernels.panel);
  if (tiles == 0 || panels == 0 || shape.in_channels == 0) {
    return grad_weight;
  }
  const int64_t tile_floats = kernels.tile_floats(shape);
  const int64_t room = std::min(
      tiles, std::clamp<int64_t>(kBlockFloats / tile_floats, 64, kMaxTiles));
  const int64_t total_floats = kernels.total_floats(shape);
  Tensor memory = empty_float(x, {room * tile_floats});
  Tensor total = empty_float(x, {total_floats});
  Conv3x3WeightArgs args{
      shape,
      x.const_data_ptr(),
      grad_out.const_data_ptr(),
      0,
      0,
      room,
      memory.mutable_data_ptr<float>(),
      total.mutable_data_ptr<float>()};
  for (; args.first < tiles; args.first += room) {
    args.count = std::min(room, tiles - args.first);
    parallel_for(args.count, tile_floats, [&](int64_t begin, int64_t end) {
      kernels.transform(args, begin, end);
    });
    parallel_for(
        panels * kElements,
        args.count * shape.in_channels,
        [&](int64_t begin, int64_t end) {
          kernels.multiply(args, begin, end);
        });
  }
  const UnpackConv3x3Args unpack{
      shape, total.const_data_ptr<float>(), grad_weight.mutable_data_ptr()};
  parallel_for(panels, total_floats / panels, [&](int64_t begin, int64_t end) {
    kernels.unpack(unpack, begin, end);
  });
  return grad_weight;
}

std::tuple<Tensor, Tensor> conv3x3_backward(
    const Tensor& grad_out_,
    const Tensor& x_,
    const Tensor& weight,
    int64_t padding,
    std::vector<bool> needs) {
  const MemoryFormat format = memory_format_of(x_);
  const Conv3x3Shape shape = shape_of(x_, weight, padding, format);
  STD_TORCH_CHECK(
      grad_out_.dim() == 4 && grad_out_.size(0) == shape.samples &&
          grad_out_.size(1) == shape.out_channels &&
          grad_out_.size(2) == shape.out_height() &&
          grad_out_.size(3) == shape.out_width() &&
          grad_out_.scalar_type() == x_.scalar_type(),
      "grad_out must have the shape and dtype of the output");
  STD_TORCH_CHECK(needs.size() == 2, "needs must be two flags");
  const Tensor grad_out = in_format(grad_out_, format);
  Tensor grad_x = torch::stable::new_empty(x_, {0});
  Tensor grad_weight = torch::stable::new_empty(x_, {0});
  if (needs[0]) {
    grad_x = input_gradient(shape, grad_out, weight, format);
  }
  if (needs[1]) {
    grad_weight = weight_gradient(shape, grad_out, in_format(x_, format));
  }
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
}

}  // namespace dlkernels
