#include <string>
#include <tuple>

#include "../include/nonlinearity_checks.h"
#include "../include/tensor.h"
#include "kernels/batch_norm_act.h"

namespace dlkernels {
namespace {

using Pass = void (*)(const BatchNormActArgs&, int64_t, int64_t);

void check_channels(
    const Tensor& x, const std::optional<Tensor>& values, const char* name) {
  STD_TORCH_CHECK(
      !values ||
          (values->dim() == 1 && values->size(0) == x.size(1) &&
           values->scalar_type() == torch::headeronly::ScalarType::Float),
      name,
      " must be float32 and have one element per channel of x");
}

void check_like(
    const Tensor& x, const std::optional<Tensor>& maps, const char* name) {
  STD_TORCH_CHECK(
      !maps || (maps->sizes() == x.sizes() &&
                maps->scalar_type() == x.scalar_type()),
      name,
      " must have the shape and dtype of x");
}

void check_sample_scale(
    const Tensor& x, const std::optional<Tensor>& sample_scale) {
  STD_TORCH_CHECK(
      !sample_scale ||
          (sample_scale->dim() == 1 && sample_scale->size(0) == x.size(0) &&
           sample_scale->scalar_type() == torch::headeronly::ScalarType::Float),
      "sample_scale must be float32 and have one element per sample of x");
}

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

Tensor zeros(const Tensor& like, int64_t size) {
  Tensor result = empty_float(like, {size});
  torch::stable::fill_(result, 0.0);
  return result;
}

BatchNormActArgs arguments(const Tensor& x, const std::string& activation) {
  BatchNormActArgs args{};
  args.dtype = scalar_type_of(x, "x");
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.area = x.size(2) * x.size(3);
  // A block of channels_last maps, read twice for its statistics, fits in the
  // second-level cache.
  constexpr int64_t kBlockElements = 32768;
  args.rows_per_block = std::clamp<int64_t>(
      kBlockElements / std::max<int64_t>(1, args.channels), 8, 256);
  args.blocks_per_sample = ceil_div(args.area, args.rows_per_block);
  args.activation = nonlinearity_of(activation);
  return args;
}

void run(const BatchNormActArgs& args, Pass pass, int64_t items) {
  const int64_t values = args.samples * args.channels * args.area;
  parallel_for(
      items,
      values / std::max<int64_t>(1, items),
      [&](int64_t begin, int64_t end) { pass(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& x_,
    const std::optional<Tensor>& weight_,
    const std::optional<Tensor>& bias_,
    const std::optional<Tensor>& mean_,
    const std::optional<Tensor>& var_,
    const std::optional<Tensor>& residual_,
    const std::optional<Tensor>& sample_scale_,
    double eps,
    const std::string& activation,
    double negative_slope,
    bool pool) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  STD_TORCH_CHECK(
      mean_.has_value() == var_.has_value(),
      "mean and var must be given both or neither");
  check_channels(x_, weight_, "weight");
  check_channels(x_, bias_, "bias");
  check_channels(x_, mean_, "mean");
  check_channels(x_, var_, "var");
  check_like(x_, residual_, "residual");
  check_sample_scale(x_, sample_scale_);

  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const auto residual = in_format(residual_, format);
  const auto weight = as_contiguous(weight_);
  const auto sample_scale = as_contiguous(sample_scale_);
  BatchNormActArgs args = arguments(x, activation);
  const Tensor bias = bias_ ? as_contiguous(*bias_) : zeros(x, args.channels);
  Tensor out = empty_maps(x, format);
  Tensor pooled = empty_float(x, {pool ? args.samples : 0, args.channels});
  Tensor mean = empty_float(x, {args.channels});
  Tensor var = empty_float(x, {args.channels});
  if (mean_) {
    torch::stable::copy_(mean, *mean_);
    torch::stable::copy_(var, *var_);
  }
  Tensor scale = empty_float(x, {args.channels});

  args.negative_slope = static_cast<float>(negative_slope);
  args.batch_statistics = !mean_.has_value();
  args.eps = static_cast<float>(eps);
  args.weight = floats(weight);
  args.bias = bias.const_data_ptr<float>();
  args.sample_scale = floats(sample_scale);
  args.mean = mean.mutable_data_ptr<float>();
  args.var = var.mutable_data_ptr<float>();
  args.scale = scale.mutable_data_ptr<float>();
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.out = out.mutable_data_ptr();
  args.pooled = pool ? pooled.mutable_data_ptr<float>() : nullptr;

  const auto& kernels = batch_norm_act_kernels();
  if (format == MemoryFormat::Contiguous) {
    run(args, kernels.forward, args.channels);
    return {out, pooled, mean, var};
  }
  const int64_t blocks = args.samples * args.blocks_per_sample;
  Tensor partial = empty_float(x, {blocks, 2, args.channels});
  args.partial = partial.mutable_data_ptr<float>();
  if (args.batch_statistics) {
    run(args, kernels.statistics, blocks);
    run(args, kernels.combine_statistics, args.channels);
  }
  kernels.set_scales(args, 0, args.channels);
  run(args, kernels.apply, blocks);
  if (pool) {
    kernels.combine_pooled(args, 0, args.samples);
  }
  return {out, pooled, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_out_,
    const std::optional<Tensor>& grad_pooled_,
    const Tensor& x_,
    const std::optional<Tensor>& weight_,
    const std::optional<Tensor>& bias_,
    const Tensor& mean_,
    const Tensor& var_,
    const std::optional<Tensor>& sample_scale_,
    bool batch_statistics,
    double eps,
    const std::string& activation,
    double negative_slope) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  check_like(x_, grad_out_, "grad_out");
  check_channels(x_, weight_, "weight");
  check_channels(x_, bias_, "bias");
  check_channels(x_, mean_, "mean");
  check_channels(x_, var_, "var");
  check_sample_scale(x_, sample_scale_);
  STD_TORCH_CHECK(
      !grad_pooled_ ||
          (grad_pooled_->dim() == 2 && grad_pooled_->size(0) == x_.size(0) &&
           grad_pooled_->size(1) == x_.size(1) &&
           grad_pooled_->scalar_type() == torch::headeronly::ScalarType::Float),
      "grad_pooled must be float32 of shape [N, C]");

  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto grad_pooled = as_contiguous(grad_pooled_);
  const auto weight = as_contiguous(weight_);
  const auto sample_scale = as_contiguous(sample_scale_);
  const Tensor mean = as_contiguous(mean_);
  const Tensor var = as_contiguous(var_);
  BatchNormActArgs args = arguments(x, activation);
  const Tensor bias = bias_ ? as_contiguous(*bias_) : zeros(x, args.channels);
  Tensor grad_x = empty_maps(x, format);
  Tensor grad_weight = empty_float(x, {args.channels});
  Tensor grad_bias = empty_float(x, {args.channels});
  Tensor scale = empty_float(x, {args.channels});

  args.negative_slope = static_cast<float>(negative_slope);
  args.batch_statistics = batch_statistics;
  args.eps = static_cast<float>(eps);
  args.weight = floats(weight);
  args.bias = bias.const_data_ptr<float>();
  args.sample_scale = floats(sample_scale);
  args.mean = mean.mutable_data_ptr<float>();
  args.var = var.mutable_data_ptr<float>();
  args.scale = scale.mutable_data_ptr<float>();
  args.x = x.const_data_ptr();
  args.grad_out = grad_out.const_data_ptr();
  args.grad_pooled = floats(grad_pooled);
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_weight = grad_weight.mutable_data_ptr<float>();
  args.grad_bias = grad_bias.mutable_data_ptr<float>();

  const auto& kernels = batch_norm_act_kernels();
  if (format == MemoryFormat::Contiguous) {
    run(args, kernels.backward, args.channels);
    return {grad_x, grad_weight, grad_bias};
  }
  const int64_t blocks = args.samples * args.blocks_per_sample;
  Tensor partial = empty_float(x, {blocks, 2, args.channels});
  args.partial = partial.mutable_data_ptr<float>();
  kernels.set_scales(args, 0, args.channels);
  run(args, kernels.gradient_sums, blocks);
  run(args, kernels.combine_gradients, args.channels);
  run(args, kernels.input_gradient, blocks);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace dlkernels
