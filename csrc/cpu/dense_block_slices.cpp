#include <tuple>

#include "dense_block_convs.h"

namespace dlkernels {
namespace {

void check_slice(const Tensor& maps, int64_t first, int64_t count) {
  STD_TORCH_CHECK(
      first >= 0 && count >= 0 && count <= maps.size(1) - first,
      "the channels of the slice must be among those of maps");
}

// Zeros in the format of `maps`.
Tensor zeros_like_maps(const Tensor& maps, MemoryFormat format) {
  Tensor result = empty_maps(maps, format);
  torch::stable::zero_(result);
  return result;
}

std::tuple<Tensor, Tensor> channel_statistics(
    const Tensor& maps_, int64_t first, int64_t count) {
  const Grid grid = grid_of(maps_);
  check_slice(maps_, first, count);
  const Tensor maps = in_format(maps_, memory_format_of(maps_));
  Tensor mean = empty_float(maps, {count});
  Tensor variance = empty_float(maps, {count});
  take_moments(
      slice_of(maps, first, count),
      grid,
      maps,
      mean.mutable_data_ptr<float>(),
      variance.mutable_data_ptr<float>());
  return {mean, variance};
}

// grad = (grad_mean + 2 grad_variance (x - mean)) / pixels
Tensor channel_statistics_backward(
    const Tensor& grad_mean,
    const Tensor& grad_variance,
    const Tensor& maps_,
    const Tensor& mean,
    int64_t first) {
  const Grid grid = grid_of(maps_);
  const int64_t count = mean.numel();
  check_slice(maps_, first, count);
  for (const Tensor* each : {&grad_mean, &grad_variance, &mean}) {
    check_per_channel(*each, count);
  }
  const MemoryFormat format = memory_format_of(maps_);
  const Tensor maps = in_format(maps_, format);
  Tensor grad = zeros_like_maps(maps, format);
  const auto pixels =
      static_cast<float>(grid.samples * grid.height * grid.width);
  Floats scale(count), shift(count);
  for (int64_t c = 0; c < count; ++c) {
    scale[c] = 2.0f * grad_variance.const_data_ptr<float>()[c] / pixels;
    shift[c] = grad_mean.const_data_ptr<float>()[c] / pixels;
  }
  const Tiling tiling = tiling_of(grid, 1);
  const Scratch scratch(maps, scratch_size(tiling, 1));
  const Slice to = slice_of(grad, first, count);
  const CopyArgs args{
      tiling,
      to,
      slice_of(maps, first, count),
      {mean.const_data_ptr<float>(), scale.data(), shift.data()},
      to,
      nullptr};
  for_each_thread(
      tiling.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
        dense_block_kernels().copy(args, scratch.of(thread), begin, end);
      });
  return grad;
}

// One 1x1 convolution of a slice, as a block without layers.
Plan plan_of_conv(const Tensor& maps, const Tensor& weight, int64_t first) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 &&
          weight.scalar_type() == maps.scalar_type(),
      "weight must have shape [out, in, 1, 1] and the dtype of maps");
  const Grid grid = grid_of(maps);
  check_slice(maps, first, weight.size(1));
  return {grid, 0, weight.size(1), 0, weight.size(0)};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_conv1x1(
    const Tensor& maps_,
    const Tensor& weight,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    std::optional<Tensor> given_mean,
    std::optional<Tensor> given_variance,
    int64_t first,
    double eps) {
  const Plan plan = plan_of_conv(maps_, weight, first);
  const bool given = given_mean.has_value();
  const Tensors weights{weight}, norm_weights{norm_weight},
      norm_biases{norm_bias};
  check_norms(norm_weights, weights);
  check_norms(norm_biases, weights);
  const MemoryFormat format = memory_format_of(maps_);
  const Tensor maps = in_format(maps_, format);
  const Slice in = slice_of(maps, first, plan.inputs);
  Tensor mean = empty_float(maps, {given ? 0 : plan.inputs});
  Tensor variance = empty_float(maps, {given ? 0 : plan.inputs});
  if (given) {
    check_per_channel(*given_mean, plan.inputs);
    check_per_channel(given_variance.value(), plan.inputs);
  } else {
    take_moments(
        in,
        plan.grid,
        maps,
        mean.mutable_data_ptr<float>(),
        variance.mutable_data_ptr<float>());
  }
  Tensor out = torch::stable::empty(
      {plan.grid.samples, plan.width, plan.grid.height, plan.grid.width},
      maps.scalar_type(),
      std::nullopt,
      maps.device(),
      std::nullopt,
      format);
  const Tensors means{given ? *given_mean : mean};
  const Tensors variances{given ? *given_variance : variance};
  const std::optional<Tensor> kept;
  const Parameters parameters{
      weights, norm_weights, norm_biases, means, variances, kept, 0.0, eps};
  const Block block(plan, parameters, maps, nullptr, nullptr);
  block.conv(0, in, 0, slice_of(out, 0, plan.width), -1, kNoDropout);
  return {out, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_conv1x1_backward(
    const Tensor& grad_out_,
    const Tensor& maps_,
    const Tensor& weight,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    const Tensor& mean,
    const Tensor& variance,
    int64_t first,
    double eps,
    bool batch_statistics) {
  const Plan plan = plan_of_conv(maps_, weight, first);
  STD_TORCH_CHECK(
      grad_out_.dim() == 4 && grad_out_.size(0) == plan.grid.samples &&
          grad_out_.size(1) == plan.width &&
          grad_out_.size(2) == plan.grid.height &&
          grad_out_.size(3) == plan.grid.width &&
          grad_out_.scalar_type() == maps_.scalar_type(),
      "grad_out must have the shape and dtype of the convolution's result");
  const Tensors weights{weight}, norm_weights{norm_weight},
      norm_biases{norm_bias};
  check_norms(norm_weights, weights);
  check_norms(norm_biases, weights);
  check_per_channel(mean, plan.inputs);
  check_per_channel(variance, plan.inputs);
  const MemoryFormat format = memory_format_of(maps_);
  const Tensor maps = in_format(maps_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const Tensors means = batch_statistics ? Tensors{} : Tensors{mean};
  const Tensors variances = batch_statistics ? Tensors{} : Tensors{variance};
  const std::optional<Tensor> kept;
  const Parameters parameters{
      weights, norm_weights, norm_biases, means, variances, kept, 0.0, eps};
  BlockBackward block(plan, parameters, maps, mean, variance);
  const Slice in = slice_of(maps, first, plan.inputs);
  const Tensor grad = empty_float(
      maps,
      {plan.grid.samples, plan.grid.height, plan.grid.width, plan.inputs});
  block.conv_backward(
      0,
      in,
      0,
      slice_of(grad_out, 0, plan.width),
      Slice{},
      Affine{},
      kNoDropout,
      Slice{},
      grad);
  Tensor grad_maps = zeros_like_maps(maps, format);
  block.copy(
      {grad.mutable_data_ptr(),
       ScalarType::Float,
       true,
       plan.inputs,
       0,
       plan.inputs},
      in,
      block.correction(0, plan.inputs),
      slice_of(grad_maps, first, plan.inputs),
      nullptr);
  return {
      grad_maps, block.weights[0], block.norm_weights[0], block.norm_biases[0]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&channel_statistics));
  m.impl(
      "channel_statistics_backward", TORCH_BOX(&channel_statistics_backward));
  m.impl("bn_relu_conv1x1", TORCH_BOX(&bn_relu_conv1x1));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace dlkernels
