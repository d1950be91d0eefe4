#include "kernels/mbconv.h"

#include <string>
#include <tuple>
#include <vector>

#include "depthwise_shape.h"
#include "norm.h"

namespace dlkernels {
namespace {

using Pass = void (*)(const MbconvArgs&, float*, int64_t, int64_t);

// Gives each thread scratch memory of its own.
void run(
    const MbconvArgs& args,
    MemoryFormat format,
    Pass pass,
    int64_t items,
    bool backward = false) {
  const DepthwiseShape& shape = args.shape;
  const int64_t scratch_floats = mbconv_kernels().scratch_floats(
      shape, format == MemoryFormat::ChannelsLast, backward);
  const int64_t work = shape.samples * shape.channels * shape.out_height *
                       shape.out_width * shape.kernel;
  parallel_for(
      items,
      work / std::max<int64_t>(1, items),
      [&](int64_t begin, int64_t end) {
        const ScratchMemory memory(scratch_floats);
        std::fill_n(memory.data(), scratch_floats, 0.0f);
        pass(args, memory.data(), begin, end);
      });
}

struct InputNorm {
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> mean;
  std::optional<Tensor> var;
  double eps;
  std::string activation;
};

// The identity stands for a norm that is not there.
InputNorm identity_of(const Tensor& x) {
  return {
      std::nullopt,
      std::nullopt,
      filled(x, x.size(1), 0.0f),
      filled(x, x.size(1), 1.0f),
      0.0,
      "identity"};
}

Norm norm_of(const Tensor& maps, MemoryFormat format, const InputNorm& norm) {
  return Norm(
      maps,
      format,
      norm.weight,
      norm.bias,
      norm.mean,
      norm.var,
      norm.eps,
      norm.activation,
      0.0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
depthwise_conv_bn_act(
    const Tensor& x_,
    const Tensor& weight_,
    const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias,
    const std::optional<Tensor>& norm_mean,
    const std::optional<Tensor>& norm_var,
    double eps,
    const std::string& activation,
    bool has_input_norm,
    const std::optional<Tensor>& input_weight,
    const std::optional<Tensor>& input_bias,
    const std::optional<Tensor>& input_mean,
    const std::optional<Tensor>& input_var,
    double input_eps,
    const std::string& input_activation,
    int64_t stride,
    const std::vector<int64_t>& padding,
    bool pool,
    bool keep_raw) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  const DepthwiseShape shape =
      depthwise_shape(x_, x_.size(1), weight_, stride, padding);
  STD_TORCH_CHECK(
      norm_mean.has_value() == norm_var.has_value() &&
          input_mean.has_value() == input_var.has_value(),
      "mean and var must be given both or neither");
  STD_TORCH_CHECK(
      keep_raw || (norm_mean && (input_mean || !has_input_norm)),
      "raw must be kept for batch statistics");
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor weight = as_contiguous(weight_);
  const Norm pre = norm_of(
      x,
      format,
      has_input_norm
          ? InputNorm{input_weight, input_bias, input_mean, input_var, input_eps, input_activation}
          : identity_of(x));
  Tensor out = empty_outputs(x, shape, shape.channels, format);
  Tensor raw = keep_raw ? empty_outputs(x, shape, shape.channels, format)
                        : torch::stable::new_empty(x, {0});
  Norm post = norm_of(
      keep_raw ? raw : out,
      format,
      {norm_weight, norm_bias, norm_mean, norm_var, eps, activation});
  Tensor pooled = empty_float(x, {pool ? shape.samples : 0, shape.channels});
  post.args.out = out.mutable_data_ptr();
  post.args.pooled = pool ? pooled.mutable_data_ptr<float>() : nullptr;
  MbconvArgs args{
      shape,
      has_input_norm,
      pre.args,
      post.args,
      weight.const_data_ptr<float>(),
      raw.mutable_data_ptr(),
      nullptr};

  const auto& kernels = mbconv_kernels();
  const auto& norms = batch_norm_act_kernels();
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  std::vector<float> weights;
  if (channels_last) {
    weights = grouped(shape, args.weight, nullptr);
    args.weight = weights.data();
  }
  if (!keep_raw) {
    norms.set_scales(pre.args, 0, shape.channels);
    norms.set_scales(post.args, 0, shape.channels);
    run(args,
        format,
        channels_last ? kernels.infer_last : kernels.infer,
        shape.samples * (channels_last ? groups_of(shape) : shape.channels));
  } else if (channels_last) {
    pre.settle_channels_last();
    run(args, format, kernels.convolve_last, shape.samples * groups_of(shape));
    post.settle_channels_last();
    post.apply_channels_last();
  } else {
    norms.set_scales(pre.args, 0, has_input_norm ? 0 : shape.channels);
    run(args, format, kernels.forward, shape.channels);
  }
  return {out, raw, pooled, post.mean, post.var, pre.mean, pre.var};
}

// grad_weight [C, K * K] from the parts of each sample and group.
void combine_weight_gradients(
    const DepthwiseShape& shape, const float* partial, float* grad_weight) {
  const int64_t taps = shape.kernel * shape.kernel;
  const int64_t groups = groups_of(shape);
  for (int64_t c = 0; c < shape.channels; ++c) {
    for (int64_t k = 0; k < taps; ++k) {
      double total = 0.0;
      for (int64_t n = 0; n < shape.samples; ++n) {
        const int64_t item = n * groups + c / kGroup;
        total += partial[(item * taps + k) * kGroup + c % kGroup];
      }
      grad_weight[c * taps + k] = static_cast<float>(total);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
depthwise_conv_bn_act_backward(
    const Tensor& grad_out_,
    const std::optional<Tensor>& grad_pooled_,
    const Tensor& x_,
    const Tensor& weight_,
    const Tensor& raw_,
    const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias,
    const Tensor& norm_mean,
    const Tensor& norm_var,
    bool norm_batch_statistics,
    double eps,
    const std::string& activation,
    bool has_input_norm,
    const std::optional<Tensor>& input_weight,
    const std::optional<Tensor>& input_bias,
    const Tensor& input_mean,
    const Tensor& input_var,
    bool input_batch_statistics,
    double input_eps,
    const std::string& input_activation,
    int64_t stride,
    const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  const DepthwiseShape shape =
      depthwise_shape(x_, x_.size(1), weight_, stride, padding);
  check_like(raw_, grad_out_, "grad_out");
  check_pooled(raw_, grad_pooled_);
  STD_TORCH_CHECK(
      raw_.dim() == 4 && raw_.size(0) == shape.samples &&
          raw_.size(1) == shape.channels && raw_.size(2) == shape.out_height &&
          raw_.size(3) == shape.out_width &&
          raw_.scalar_type() == x_.scalar_type(),
      "raw must have the shape of the convolution's output");
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor raw = in_format(raw_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto grad_pooled = as_contiguous(grad_pooled_);
  const Tensor weight = as_contiguous(weight_);
  Norm pre = norm_of(
      x,
      format,
      has_input_norm
          ? InputNorm{input_weight, input_bias, input_mean, input_var, input_eps, input_activation}
          : identity_of(x));
  Norm post = norm_of(
      raw,
      format,
      {norm_weight, norm_bias, norm_mean, norm_var, eps, activation});
  Tensor grad_x = empty_maps(x, format);
  const int64_t taps = shape.kernel * shape.kernel;
  Tensor grad_weight =
      empty_float(x, {shape.channels, 1, shape.kernel, shape.kernel});
  std::array<Tensor, 4> grads{
      empty_float(x, {shape.channels}),
      empty_float(x, {shape.channels}),
      empty_float(x, {shape.channels}),
      empty_float(x, {shape.channels})};
  post.args.batch_statistics = norm_batch_statistics;
  post.args.grad_out = grad_out.const_data_ptr();
  post.args.grad_pooled = floats_or_null(grad_pooled);
  post.args.grad_weight = grads[0].mutable_data_ptr<float>();
  post.args.grad_bias = grads[1].mutable_data_ptr<float>();
  pre.args.batch_statistics = input_batch_statistics;
  pre.args.grad_x = grad_x.mutable_data_ptr();
  pre.args.grad_out = grad_x.const_data_ptr();
  pre.args.grad_weight = grads[2].mutable_data_ptr<float>();
  pre.args.grad_bias = grads[3].mutable_data_ptr<float>();
  MbconvArgs args{
      shape,
      has_input_norm,
      pre.args,
      post.args,
      weight.const_data_ptr<float>(),
      raw.mutable_data_ptr(),
      grad_weight.mutable_data_ptr<float>()};

  const auto& kernels = mbconv_kernels();
  if (format == MemoryFormat::Contiguous) {
    run(args, format, kernels.backward, shape.channels, true);
  } else {
    const int64_t items = shape.samples * groups_of(shape);
    const std::vector<float> weights = grouped(shape, args.weight, nullptr);
    args.weight = weights.data();
    Tensor partial = empty_float(x, {items, taps, kGroup});
    args.grad_weight = partial.mutable_data_ptr<float>();
    post.reduce_gradients_channels_last();
    batch_norm_act_kernels().set_scales(pre.args, 0, shape.channels);
    run(args, format, kernels.convolve_last_backward, items, true);
    combine_weight_gradients(
        shape,
        partial.const_data_ptr<float>(),
        grad_weight.mutable_data_ptr<float>());
    if (has_input_norm) {
      pre.combine_sample_sums();
      // What lies in grad_x has come through the activation.
      pre.args.activation = Nonlinearity::Identity;
      pre.run(batch_norm_act_kernels().input_gradient, pre.blocks());
    }
  }
  return {grad_x, grad_weight, grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("depthwise_conv_bn_act", TORCH_BOX(&depthwise_conv_bn_act));
  m.impl(
      "depthwise_conv_bn_act_backward",
      TORCH_BOX(&depthwise_conv_bn_act_backward));
}

}  // namespace dlkernels
