#include "kernels/residual_sum.h"

#include <string>
#include <tuple>

#include "norm.h"

namespace dlkernels {
namespace {

// [C], or [N, C] of the maps' samples and channels.
Tensor channel_values(
    const Tensor& x, const Tensor& values, int64_t dims, const char* name) {
  const bool fits =
      values.dim() == dims && values.size(dims - 1) == x.size(1) &&
      (dims == 1 || values.size(0) == x.size(0)) &&
      values.scalar_type() == torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(
      fits, name, " must be float32 of shape ", dims == 1 ? "[C]" : "[N, C]");
  return as_contiguous(values);
}

// Maps, how they are cut into items, and the sums over these.
class Passes {
 public:
  using Pass = void (*)(const ResidualSumArgs&, int64_t, int64_t);

  Passes(const Tensor& x, MemoryFormat format) {
    args.dtype = scalar_type_of(x, "x");
    args.channels_last = format == MemoryFormat::ChannelsLast;
    args.samples = x.size(0);
    args.channels = x.size(1);
    args.area = x.size(2) * x.size(3);
    // A block of channels_last maps, read twice for its statistics, fits in
    // the second-level cache.
    constexpr int64_t kBlockElements = 32768;
    args.rows_per_block = std::clamp<int64_t>(
        kBlockElements / std::max<int64_t>(1, args.channels), 8, 256);
    args.blocks_per_sample = ceil_div(args.area, args.rows_per_block);
    args.x = x.const_data_ptr();
  }

  void run(Pass pass) const {
    const int64_t items =
        args.samples *
        (args.channels_last ? args.blocks_per_sample : args.channels);
    const int64_t values = args.samples * args.channels * args.area;
    parallel_for(
        items,
        values / std::max<int64_t>(1, items),
        [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  }

  // Two values of each sample's channels, [N, C].
  std::tuple<Tensor, Tensor> reduce(const Tensor& x, Pass pass, Pass combine) {
    Tensor first = empty_float(x, {args.samples, args.channels});
    Tensor second = empty_float(x, {args.samples, args.channels});
    Tensor partial = empty_float(
        x,
        {args.channels_last ? args.samples * args.blocks_per_sample : 0,
         2,
         args.channels});
    args.first = first.mutable_data_ptr<float>();
    args.second = second.mutable_data_ptr<float>();
    args.partial = partial.mutable_data_ptr<float>();
    if (args.area == 0) {
      torch::stable::fill_(first, 0.0);
      torch::stable::fill_(second, 0.0);
      return {first, second};
    }
    run(pass);
    if (args.channels_last) {
      combine(args, 0, args.samples);
    }
    return {first, second};
  }

  ResidualSumArgs args{};
};

std::tuple<Tensor, Tensor> residual_sum_moments(const Tensor& x_) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const auto& kernels = residual_sum_kernels();
  return Passes(x, format).reduce(x, kernels.moments, kernels.combine_moments);
}

Tensor residual_sum(
    const Tensor& x_,
    const Tensor& shortcut_,
    const Tensor& mean_,
    const Tensor& slope_,
    const Tensor& offset_,
    bool relu) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  check_like(x_, shortcut_, "shortcut");
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor shortcut = in_format(shortcut_, format);
  const Tensor mean = channel_values(x, mean_, 1, "mean");
  const Tensor slope = channel_values(x, slope_, 2, "slope");
  const Tensor offset = channel_values(x, offset_, 2, "offset");
  Tensor out = empty_maps(x, format);
  Passes passes(x, format);
  passes.args.shortcut = shortcut.const_data_ptr();
  passes.args.mean = mean.const_data_ptr<float>();
  passes.args.slope = slope.const_data_ptr<float>();
  passes.args.offset = offset.const_data_ptr<float>();
  passes.args.relu = relu;
  passes.args.out = out.mutable_data_ptr();
  passes.run(residual_sum_kernels().apply);
  return out;
}

std::tuple<Tensor, Tensor> residual_sum_reduce(
    const Tensor& grad_out_,
    const std::optional<Tensor>& out_,
    const Tensor& x_,
    const Tensor& mean_) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  check_like(x_, grad_out_, "grad_out");
  if (out_) {
    check_like(x_, *out_, "out");
  }
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto out = in_format(out_, format);
  const Tensor mean = channel_values(x, mean_, 1, "mean");
  Passes passes(x, format);
  passes.args.grad_out = grad_out.const_data_ptr();
  passes.args.mask = data_or_null(out);
  passes.args.mean = mean.const_data_ptr<float>();
  const auto& kernels = residual_sum_kernels();
  return passes.reduce(x, kernels.sums, kernels.combine_sums);
}

std::tuple<Tensor, Tensor> residual_sum_backward(
    const Tensor& grad_out_,
    const std::optional<Tensor>& out_,
    const Tensor& x_,
    const Tensor& mean_,
    const Tensor& slope_,
    const Tensor& offset_,
    const Tensor& tilt_,
    bool shortcut_grad) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  check_like(x_, grad_out_, "grad_out");
  if (out_) {
    check_like(x_, *out_, "out");
  }
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto out = in_format(out_, format);
  const Tensor mean = channel_values(x, mean_, 1, "mean");
  const Tensor slope = channel_values(x, slope_, 2, "slope");
  const Tensor offset = channel_values(x, offset_, 2, "offset");
  const Tensor tilt = channel_values(x, tilt_, 1, "tilt");
  Tensor grad_x = empty_maps(x, format);
  Tensor grad_shortcut =
      shortcut_grad ? empty_maps(x, format) : torch::stable::new_empty(x, {0});
  Passes passes(x, format);
  passes.args.grad_out = grad_out.const_data_ptr();
  passes.args.mask = data_or_null(out);
  passes.args.mean = mean.const_data_ptr<float>();
  passes.args.slope = slope.const_data_ptr<float>();
  passes.args.offset = offset.const_data_ptr<float>();
  passes.args.tilt = tilt.const_data_ptr<float>();
  passes.args.grad_x = grad_x.mutable_data_ptr();
  passes.args.grad_shortcut =
      shortcut_grad ? grad_shortcut.mutable_data_ptr() : nullptr;
  passes.run(residual_sum_kernels().gradient);
  return {grad_x, grad_shortcut};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("residual_sum_moments", TORCH_BOX(&residual_sum_moments));
  m.impl("residual_sum", TORCH_BOX(&residual_sum));
  m.impl("residual_sum_reduce", TORCH_BOX(&residual_sum_reduce));
  m.impl("residual_sum_backward", TORCH_BOX(&residual_sum_backward));
}

}  // namespace dlkernels
