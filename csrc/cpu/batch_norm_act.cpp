#include <string>
#include <tuple>

#include "norm.h"

namespace dlkernels {
namespace {

void check_sample_scale(
    const Tensor& x, const std::optional<Tensor>& sample_scale) {
  STD_TORCH_CHECK(
      !sample_scale ||
          (sample_scale->dim() == 1 && sample_scale->size(0) == x.size(0) &&
           sample_scale->scalar_type() == torch::headeronly::ScalarType::Float),
      "sample_scale must be float32 and have one element per sample of x");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& x_,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& var,
    const std::optional<Tensor>& residual_,
    const std::optional<Tensor>& sample_scale_,
    double eps,
    const std::string& activation,
    double negative_slope,
    bool pool) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  STD_TORCH_CHECK(
      mean.has_value() == var.has_value(),
      "mean and var must be given both or neither");
  check_like(x_, residual_, "residual");
  check_sample_scale(x_, sample_scale_);

  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const auto residual = in_format(residual_, format);
  const auto sample_scale = as_contiguous(sample_scale_);
  Norm norm(
      x, format, weight, bias, mean, var, eps, activation, negative_slope);
  Tensor out = empty_maps(x, format);
  Tensor pooled = empty_float(x, {pool ? x.size(0) : 0, x.size(1)});
  norm.args.sample_scale = floats_or_null(sample_scale);
  norm.args.residual = data_or_null(residual);
  norm.args.out = out.mutable_data_ptr();
  norm.args.pooled = pool ? pooled.mutable_data_ptr<float>() : nullptr;

  if (format == MemoryFormat::Contiguous) {
    norm.run(batch_norm_act_kernels().forward, x.size(1));
  } else {
    norm.settle_channels_last();
    norm.apply_channels_last();
  }
  return {out, pooled, norm.mean, norm.var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_out_,
    const std::optional<Tensor>& grad_pooled_,
    const Tensor& x_,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const Tensor& mean,
    const Tensor& var,
    const std::optional<Tensor>& sample_scale_,
    bool batch_statistics,
    double eps,
    const std::string& activation,
    double negative_slope) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  check_like(x_, grad_out_, "grad_out");
  check_sample_scale(x_, sample_scale_);
  check_pooled(x_, grad_pooled_);

  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto grad_pooled = as_contiguous(grad_pooled_);
  const auto sample_scale = as_contiguous(sample_scale_);
  Norm norm(
      x, format, weight, bias, mean, var, eps, activation, negative_slope);
  Tensor grad_x = empty_maps(x, format);
  Tensor grad_weight = empty_float(x, {x.size(1)});
  Tensor grad_bias = empty_float(x, {x.size(1)});
  norm.args.batch_statistics = batch_statistics;
  norm.args.sample_scale = floats_or_null(sample_scale);
  norm.args.grad_out = grad_out.const_data_ptr();
  norm.args.grad_pooled = floats_or_null(grad_pooled);
  norm.args.grad_x = grad_x.mutable_data_ptr();
  norm.args.grad_weight = grad_weight.mutable_data_ptr<float>();
  norm.args.grad_bias = grad_bias.mutable_data_ptr<float>();

  if (format == MemoryFormat::Contiguous) {
    norm.run(batch_norm_act_kernels().backward, x.size(1));
  } else {
    norm.reduce_gradients_channels_last();
    norm.run(batch_norm_act_kernels().input_gradient, norm.blocks());
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace dlkernels
