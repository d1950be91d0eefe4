#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <string>
#include <tuple>

#include "../include/squeeze_excite_checks.h"
#include "current_stream.h"
#include "kernels/squeeze_excite.h"

namespace dlkernels::cuda {
namespace {

Maps maps_of(const Tensor& x, MemoryFormat format) {
  return {
      scalar_type_of(x, "x"),
      format == MemoryFormat::ChannelsLast,
      x.size(0),
      x.size(1),
      x.size(2) * x.size(3)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_cuda(
    const Tensor& x_,
    const Tensor& reduce_weight_,
    const std::optional<Tensor>& reduce_bias_,
    const Tensor& expand_weight_,
    const std::optional<Tensor>& expand_bias_,
    const std::optional<Tensor>& shortcut_,
    const std::string& activation_name,
    const std::string& gate_name,
    const std::string& output_activation) {
  check_weights(x_, reduce_weight_, expand_weight_);
  check_bias(x_, reduce_bias_, reduce_weight_.size(0), "reduce_bias");
  check_bias(x_, expand_bias_, x_.size(1), "expand_bias");
  if (shortcut_) {
    check_maps(x_, *shortcut_, "shortcut");
  }
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor reduce_weight = as_contiguous(reduce_weight_);
  const Tensor expand_weight = as_contiguous(expand_weight_);
  const auto reduce_bias = as_contiguous(reduce_bias_);
  const auto expand_bias = as_contiguous(expand_bias_);
  const auto shortcut = in_format(shortcut_, format);

  const Maps maps = maps_of(x, format);
  const int64_t squeezed = reduce_weight.size(0);
  Tensor out = empty_maps(x, format);
  Tensor pooled = empty_float(x, {maps.samples, maps.channels});
  Tensor hidden = empty_float(x, {maps.samples, squeezed});
  Tensor scale = empty_float(x, {maps.samples, maps.channels});
  Tensor partial =
      empty_float(x, {maps.samples, splits_of(maps), maps.channels});
  squeeze_excite(
      SqueezeExcite{
          maps,
          squeezed,
          activation_of(activation_name),
          gate_of(gate_name),
          output_activation == "relu",
          x.const_data_ptr(),
          reduce_weight.const_data_ptr(),
          data_or_null(reduce_bias),
          expand_weight.const_data_ptr(),
          data_or_null(expand_bias),
          data_or_null(shortcut),
          partial.mutable_data_ptr<float>(),
          out.mutable_data_ptr(),
          pooled.mutable_data_ptr<float>(),
          hidden.mutable_data_ptr<float>(),
          scale.mutable_data_ptr<float>()},
      stream_of(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, pooled, hidden, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
squeeze_excite_backward_cuda(
    const Tensor& grad_out_,
    const Tensor& x_,
    const Tensor& reduce_weight_,
    const Tensor& expand_weight_,
    const std::optional<Tensor>& out_,
    const Tensor& pooled_,
    const Tensor& hidden_,
    const Tensor& scale_,
    const std::string& activation_name,
    const std::string& gate_name,
    bool shortcut_grad) {
  check_weights(x_, reduce_weight_, expand_weight_);
  check_maps(x_, grad_out_, "grad_out");
  if (out_) {
    check_maps(x_, *out_, "out");
  }
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto out = in_format(out_, format);
  const Tensor reduce_weight = as_contiguous(reduce_weight_);
  const Tensor expand_weight = as_contiguous(expand_weight_);
  const Tensor pooled = as_contiguous(pooled_);
  const Tensor hidden = as_contiguous(hidden_);
  const Tensor scale = as_contiguous(scale_);

  const Maps maps = maps_of(x, format);
  const int64_t squeezed = reduce_weight.size(0);
  Tensor grad_x = empty_maps(x, format);
  Tensor grad_shortcut =
      shortcut_grad ? empty_maps(x, format) : torch::stable::new_empty(x, {0});
  Tensor grad_reduce_weight =
      torch::stable::new_empty(x, {squeezed, maps.channels});
  Tensor grad_reduce_bias = torch::stable::new_empty(x, {squeezed});
  Tensor grad_expand_weight =
      torch::stable::new_empty(x, {maps.channels, squeezed});
  Tensor grad_expand_bias = torch::stable::new_empty(x, {maps.channels});
  Tensor partial =
      empty_float(x, {maps.samples, splits_of(maps), maps.channels});
  Tensor grad_logits = empty_float(x, {maps.samples, maps.channels});
  Tensor grad_hidden = empty_float(x, {maps.samples, squeezed});
  Tensor grad_pooled = empty_float(x, {maps.samples, maps.channels});
  squeeze_excite_backward(
      SqueezeExciteBackward{
          maps,
          squeezed,
          activation_of(activation_name),
          gate_of(gate_name),
          grad_out.const_data_ptr(),
          x.const_data_ptr(),
          reduce_weight.const_data_ptr(),
          expand_weight.const_data_ptr(),
          data_or_null(out),
          pooled.const_data_ptr<float>(),
          hidden.const_data_ptr<float>(),
          scale.const_data_ptr<float>(),
          partial.mutable_data_ptr<float>(),
          grad_logits.mutable_data_ptr<float>(),
          grad_hidden.mutable_data_ptr<float>(),
          grad_pooled.mutable_data_ptr<float>(),
          grad_x.mutable_data_ptr(),
          grad_reduce_weight.mutable_data_ptr(),
          grad_reduce_bias.mutable_data_ptr(),
          grad_expand_weight.mutable_data_ptr(),
          grad_expand_bias.mutable_data_ptr(),
          shortcut_grad ? grad_shortcut.mutable_data_ptr() : nullptr},
      stream_of(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {
      grad_x,
      grad_reduce_weight,
      grad_reduce_bias,
      grad_expand_weight,
      grad_expand_bias,
      grad_shortcut};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels_cuda, CUDA, m) {
  m.impl("squeeze_excite", TORCH_BOX(&squeeze_excite_cuda));
  m.impl("squeeze_excite_backward", TORCH_BOX(&squeeze_excite_backward_cuda));
}

}  // namespace dlkernels::cuda
