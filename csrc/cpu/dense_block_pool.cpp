#include <tuple>

#include "dense_block.h"

namespace dlkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool(
    const Tensor& x_,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    std::optional<Tensor> given_mean,
    std::optional<Tensor> given_variance,
    double eps) {
  const Grid grid = grid_of(x_);
  check_per_channel(norm_weight, x_.size(1));
  check_per_channel(norm_bias, x_.size(1));
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const int64_t channels = x.size(1);
  const bool batch_statistics = !given_mean;
  if (!batch_statistics) {
    check_per_channel(*given_mean, channels);
    check_per_channel(given_variance.value(), channels);
  }
  Tensor mean = empty_float(x, {batch_statistics ? channels : 0});
  Tensor variance = empty_float(x, {batch_statistics ? channels : 0});
  Tensor out = torch::stable::empty(
      {grid.samples, channels, grid.height / 2, grid.width / 2},
      x.scalar_type(),
      std::nullopt,
      x.device(),
      std::nullopt,
      format);
  const auto& kernels = dense_block_kernels();
  const Slice in = slice_of(x, 0, channels);
  if (batch_statistics) {
    take_moments(
        in,
        grid,
        x,
        mean.mutable_data_ptr<float>(),
        variance.mutable_data_ptr<float>());
  }
  const Norm norm(
      (batch_statistics ? mean : *given_mean).const_data_ptr<float>(),
      (batch_statistics ? variance : *given_variance).const_data_ptr<float>(),
      norm_weight,
      norm_bias,
      eps);
  const Scratch scratch(x, pool_scratch_size(grid));
  const PoolArgs args{grid, in, norm.affine(), slice_of(out, 0, channels)};
  const int64_t rows = grid.width < 2 ? 0 : grid.samples * (grid.height / 2);
  for_each_thread(rows, [&](int64_t thread, int64_t begin, int64_t end) {
    kernels.pool(args, scratch.of(thread), begin, end);
  });
  return {out, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool_backward(
    const Tensor& grad_out_,
    const Tensor& x_,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    const Tensor& mean,
    const Tensor& variance,
    double eps,
    bool batch_statistics) {
  const Grid grid = grid_of(x_);
  for (const Tensor* each : {&norm_weight, &norm_bias, &mean, &variance}) {
    check_per_channel(*each, x_.size(1));
  }
  STD_TORCH_CHECK(
      grad_out_.dim() == 4 && grad_out_.size(0) == grid.samples &&
          grad_out_.size(1) == x_.size(1) &&
          grad_out_.size(2) == grid.height / 2 &&
          grad_out_.size(3) == grid.width / 2 &&
          grad_out_.scalar_type() == x_.scalar_type(),
      "grad_out must have the shape and dtype of the pooled maps");
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const int64_t channels = x.size(1);
  Tensor grad_x = empty_maps(x, format);
  Tensor grad_weight = empty_float(x, {channels});
  Tensor grad_bias = empty_float(x, {channels});
  const Norm norm(
      mean.const_data_ptr<float>(),
      variance.const_data_ptr<float>(),
      norm_weight,
      norm_bias,
      eps);

  const auto& kernels = dense_block_kernels();
  const Scratch scratch(x, pool_scratch_size(grid));
  const int64_t threads = torch::stable::get_num_threads();
  Floats partial(threads * 2 * channels);
  PoolBackwardArgs args{
      grid,
      slice_of(x, 0, channels),
      norm.affine(),
      slice_of(grad_out, 0, channels),
      {},
      slice_of(grad_x, 0, channels)};
  const auto run = [&](bool wants_sums) {
    for_each_thread(
        grid.samples * ((grid.height + 1) / 2),
        [&](int64_t thread, int64_t begin, int64_t end) {
          float* sums = partial.data() + thread * 2 * channels;
          kernels.pool_backward(
              args,
              wants_sums ? sums : nullptr,
              scratch.of(thread),
              begin,
              end);
        });
  };
  // The gradient through the batch's statistics needs the sums first.
  if (batch_statistics) {
    args.grad_in.data = nullptr;
  }
  run(true);
  auto* weight_data = grad_weight.mutable_data_ptr<float>();
  auto* bias_data = grad_bias.mutable_data_ptr<float>();
  Floats correction_scale(channels);
  Floats correction_shift(channels);
  const double pixels =
      static_cast<double>(grid.samples * grid.height * grid.width);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, product = 0.0;
    for (int64_t thread = 0; thread < threads; ++thread) {
      sum += partial[thread * 2 * channels + c];
      product += partial[(thread * 2 + 1) * channels + c];
    }
    const double deviation = norm.inverse_deviation(c);
    bias_data[c] = static_cast<float>(sum);
    weight_data[c] = static_cast<float>(product * deviation);
    correction_scale[c] = static_cast<float>(
        -norm.scale(c) * deviation * deviation * product / pixels);
    correction_shift[c] = static_cast<float>(-norm.scale(c) * sum / pixels);
  }
  if (batch_statistics) {
    args.grad_in = slice_of(grad_x, 0, channels);
    args.correction = {
        mean.const_data_ptr<float>(),
        correction_scale.data(),
        correction_shift.data()};
    run(false);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("norm_relu_pool", TORCH_BOX(&norm_relu_pool));
  m.impl("norm_relu_pool_backward", TORCH_BOX(&norm_relu_pool_backward));
}

}  // namespace dlkernels
