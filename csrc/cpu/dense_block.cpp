#include <tuple>
#include <vector>

#include "dense_block_convs.h"

namespace dlkernels {
namespace {

// Maps [layers, samples, height, width, channels] between two convolutions.
Tensor empty_maps_between(
    const Plan& plan,
    const Tensor& like,
    int64_t layers,
    torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(
      like,
      {layers * plan.grid.samples,
       plan.grid.height,
       plan.grid.width,
       plan.width},
      dtype);
}

Slice slice_between(const Plan& plan, const Tensor& maps, int64_t layer) {
  const int64_t bytes = plan.pixels() * plan.width * maps.element_size();
  return {
      static_cast<char*>(maps.mutable_data_ptr()) + layer * bytes,
      scalar_type_of(maps, "bottlenecks"),
      true,
      plan.width,
      0,
      plan.width};
}

Dropout dropout_of(
    const Plan& plan, const Parameters& parameters, int64_t layer) {
  if (!parameters.kept) {
    return kNoDropout;
  }
  const auto* kept =
      static_cast<const uint8_t*>(parameters.kept->const_data_ptr());
  return {
      kept + layer * plan.pixels() * plan.growth,
      static_cast<float>(1.0 / (1.0 - parameters.dropout))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_block(
    const Tensor& x_,
    Tensors weights,
    Tensors norm_weights,
    Tensors norm_biases,
    Tensors means,
    Tensors variances,
    std::optional<Tensor> kept,
    double dropout,
    double eps,
    bool save_bottlenecks) {
  const Parameters parameters{
      weights, norm_weights, norm_biases, means, variances, kept, dropout, eps};
  const Plan plan = plan_of(x_, false, parameters);
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  Tensor out = torch::stable::empty(
      {plan.grid.samples, plan.channels(), plan.grid.height, plan.grid.width},
      x.scalar_type(),
      std::nullopt,
      x.device(),
      std::nullopt,
      format);
  const bool batch_statistics = means.empty();
  const int64_t statistics = batch_statistics ? plan.statistics() : 0;
  Tensor mean = empty_float(x, {statistics});
  Tensor variance = empty_float(x, {statistics});
  Tensor bottlenecks = empty_maps_between(
      plan, x, save_bottlenecks ? plan.layers : 1, x.scalar_type());
  const Block block(
      plan,
      parameters,
      x,
      mean.mutable_data_ptr<float>(),
      variance.mutable_data_ptr<float>());

  block.copy_in(slice_of(x, 0, plan.inputs), slice_of(out, 0, plan.inputs));
  for (int64_t layer = 0; layer < plan.layers; ++layer) {
    const int64_t channels = plan.read_by(layer);
    const int64_t last = plan.last_conv(layer);
    Slice in = slice_of(out, 0, channels);
    int64_t in_first = 0;
    if (plan.width > 0) {
      const Slice between =
          slice_between(plan, bottlenecks, save_bottlenecks ? layer : 0);
      const int64_t first = plan.statistics_between(layer);
      block.conv(last - 1, in, 0, between, first, kNoDropout);
      in = between;
      in_first = first;
    }
    block.conv(
        last,
        in,
        in_first,
        slice_of(out, channels, plan.growth),
        channels,
        dropout_of(plan, parameters, layer));
  }
  if (!save_bottlenecks) {
    bottlenecks = empty_maps_between(plan, x, 0, x.scalar_type());
  }
  return {out, bottlenecks, mean, variance};
}

std::tuple<Tensor, Tensors, Tensors, Tensors> dense_block_backward(
    const Tensor& grad_out_,
    const Tensor& out_,
    const Tensor& bottlenecks_,
    const Tensor& mean,
    const Tensor& variance,
    Tensors weights,
    Tensors norm_weights,
    Tensors norm_biases,
    Tensors means,
    Tensors variances,
    std::optional<Tensor> kept,
    double dropout,
    double eps) {
  const Parameters parameters{
      weights, norm_weights, norm_biases, means, variances, kept, dropout, eps};
  const Plan plan = plan_of(out_, true, parameters);
  const int64_t statistics = means.empty() ? plan.statistics() : 0;
  STD_TORCH_CHECK(
      mean.numel() == statistics && variance.numel() == statistics,
      "mean and variance must be those of the forward pass");
  STD_TORCH_CHECK(
      grad_out_.sizes() == out_.sizes() &&
          grad_out_.scalar_type() == out_.scalar_type(),
      "grad_out must have the shape and dtype of out");
  const bool saved = bottlenecks_.numel() > 0;
  STD_TORCH_CHECK(
      !saved ||
          bottlenecks_.numel() == plan.layers * plan.pixels() * plan.width,
      "bottlenecks must be those of the forward pass");

  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  const MemoryFormat format = memory_format_of(out_);
  const Tensor out = in_format(out_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const Tensor bottlenecks =
      saved ? as_contiguous(bottlenecks_)
            : empty_maps_between(plan, out, 1, out.scalar_type());
  const Tensor grad_between = empty_maps_between(plan, out, 1, kFloat);
  // Of all channels that a layer of the block reads.
  const Tensor grad = empty_float(
      out,
      {plan.grid.samples,
       plan.grid.height,
       plan.grid.width,
       plan.read_by(plan.layers - 1)});
  const auto grad_slice = [&](int64_t first, int64_t count) {
    return Slice{
        grad.mutable_data_ptr(),
        ScalarType::Float,
        true,
        grad.size(3),
        first,
        count};
  };

  BlockBackward block(plan, parameters, out, mean, variance);
  for (int64_t layer = plan.layers - 1; layer >= 0; --layer) {
    const bool first_turn = layer == plan.layers - 1;
    const int64_t channels = plan.read_by(layer);
    const int64_t last = plan.last_conv(layer);
    const Slice in = slice_of(out, 0, channels);
    const Slice added = slice_of(out, channels, plan.growth);
    const Slice grad_added = first_turn
                                 ? slice_of(grad_out, channels, plan.growth)
                                 : grad_slice(channels, plan.growth);
    const Slice grad_before =
        first_turn ? slice_of(grad_out, 0, channels) : grad_slice(0, channels);
    const Affine correction =
        first_turn ? Affine{} : block.correction(channels, plan.growth);
    const Dropout drop = dropout_of(plan, parameters, layer);
    if (plan.width == 0) {
      block.conv_backward(
          last, in, 0, grad_added, added, correction, drop, grad_before, grad);
      continue;
    }
    const Slice between = slice_between(plan, bottlenecks, saved ? layer : 0);
    const int64_t first = plan.statistics_between(layer);
    if (!saved) {
      block.conv(last - 1, in, 0, between, -1, kNoDropout);
    }
    block.conv_backward(
        last,
        between,
        first,
        grad_added,
        added,
        correction,
        drop,
        Slice{},
        grad_between);
    block.conv_backward(
        last - 1,
        in,
        0,
        slice_between(plan, grad_between, 0),
        between,
        block.correction(first, plan.width),
        kNoDropout,
        grad_before,
        grad);
  }
  Tensor grad_x = torch::stable::empty(
      {plan.grid.samples, plan.inputs, plan.grid.height, plan.grid.width},
      out.scalar_type(),
      std::nullopt,
      out.device(),
      std::nullopt,
      format);
  block.copy(
      grad_slice(0, plan.inputs),
      slice_of(out, 0, plan.inputs),
      block.correction(0, plan.inputs),
      slice_of(grad_x, 0, plan.inputs),
      nullptr);
  return {grad_x, block.weights, block.norm_weights, block.norm_biases};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("dense_block", TORCH_BOX(&dense_block));
  m.impl("dense_block_backward", TORCH_BOX(&dense_block_backward));
}

}  // namespace dlkernels
