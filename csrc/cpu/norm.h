#pragma once

// What launchers of kernels with a batch norm inside share.

#include <string>
#include <vector>

#include "../include/nonlinearity_checks.h"
#include "../include/tensor.h"
#include "kernels/batch_norm_act.h"

namespace dlkernels {

inline void check_channels(
    const std::optional<Tensor>& values, int64_t channels, const char* name) {
  STD_TORCH_CHECK(
      !values ||
          (values->dim() == 1 && values->size(0) == channels &&
           values->scalar_type() == torch::headeronly::ScalarType::Float),
      name,
      " must be float32 and have one element per channel of x");
}

inline void check_like(
    const Tensor& x, const std::optional<Tensor>& maps, const char* name) {
  STD_TORCH_CHECK(
      !maps || (maps->sizes() == x.sizes() &&
                maps->scalar_type() == x.scalar_type()),
      name,
      " must have the shape and dtype of x");
}

inline void check_pooled(
    const Tensor& x, const std::optional<Tensor>& grad_pooled) {
  STD_TORCH_CHECK(
      !grad_pooled ||
          (grad_pooled->dim() == 2 && grad_pooled->size(0) == x.size(0) &&
           grad_pooled->size(1) == x.size(1) &&
           grad_pooled->scalar_type() == torch::headeronly::ScalarType::Float),
      "grad_pooled must be float32 of shape [N, C]");
}

inline const float* floats_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

inline Tensor filled(const Tensor& like, int64_t size, float value) {
  Tensor result = empty_float(like, {size});
  torch::stable::fill_(result, value);
  return result;
}

// A batch norm of maps and the activation after it: the arguments of the
// kernels and the tensors that they point to.
class Norm {
 public:
  using Pass = void (*)(const BatchNormActArgs&, int64_t, int64_t);

  // Statistics that are not given become those of the batch.
  Norm(
      const Tensor& maps,
      MemoryFormat format,
      const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias,
      const std::optional<Tensor>& mean,
      const std::optional<Tensor>& var,
      double eps,
      const std::string& activation,
      double negative_slope)
      : mean(copied(maps, mean, "mean")),
        var(copied(maps, var, "var")),
        weight_(as_contiguous(weight)),
        bias_(as_contiguous(bias)),
        zeros_(bias ? 0 : maps.size(1)),
        scale_(maps.size(1)) {
    check_channels(weight, maps.size(1), "weight");
    check_channels(bias, maps.size(1), "bias");
    args.dtype = scalar_type_of(maps, "x");
    args.samples = maps.size(0);
    args.channels = maps.size(1);
    args.area = maps.size(2) * maps.size(3);
    // A block of channels_last maps, read twice for its statistics, fits in
    // the second-level cache.
    constexpr int64_t kBlockElements = 32768;
    args.rows_per_block = std::clamp<int64_t>(
        kBlockElements / std::max<int64_t>(1, args.channels), 8, 256);
    args.blocks_per_sample = ceil_div(args.area, args.rows_per_block);
    args.activation = nonlinearity_of(activation);
    args.negative_slope = static_cast<float>(negative_slope);
    args.batch_statistics = !mean.has_value();
    args.eps = static_cast<float>(eps);
    args.weight = floats_or_null(weight_);
    args.bias = bias_ ? bias_->const_data_ptr<float>() : zeros_.data();
    args.mean = this->mean.mutable_data_ptr<float>();
    args.var = this->var.mutable_data_ptr<float>();
    args.scale = scale_.data();
    args.x = maps.const_data_ptr();
    if (format == MemoryFormat::ChannelsLast) {
      partial_ = empty_float(maps, {blocks(), 2, args.channels});
      args.partial = partial_->mutable_data_ptr<float>();
    }
  }

  Norm(const Norm&) = delete;
  Norm& operator=(const Norm&) = delete;

  int64_t blocks() const {
    return args.samples * args.blocks_per_sample;
  }

  void run(Pass pass, int64_t items) const {
    const int64_t values = args.samples * args.channels * args.area;
    parallel_for(
        items,
        values / std::max<int64_t>(1, items),
        [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  }

  // The statistics and the scales of channels_last maps.
  void settle_channels_last() const {
    const auto& kernels = batch_norm_act_kernels();
    if (args.batch_statistics) {
      run(kernels.statistics, blocks());
      run(kernels.combine_statistics, args.channels);
    }
    kernels.set_scales(args, 0, args.channels);
  }

  // out, and pooled where it is asked for, of channels_last maps.
  void apply_channels_last() const {
    const auto& kernels = batch_norm_act_kernels();
    run(kernels.apply, blocks());
    if (args.pooled != nullptr) {
      kernels.combine_pooled(args, 0, args.samples);
    }
  }

  // The gradients of weight and bias, and the terms of the input's gradient,
  // of channels_last maps.
  void reduce_gradients_channels_last() const {
    const auto& kernels = batch_norm_act_kernels();
    kernels.set_scales(args, 0, args.channels);
    run(kernels.gradient_sums, blocks());
    run(kernels.combine_gradients, args.channels);
  }

  // The same gradients and terms from sums over each sample, which stand in
  // args.partial, [samples, 2, channels].
  void combine_sample_sums() const {
    BatchNormActArgs samples = args;
    samples.rows_per_block = args.area;
    samples.blocks_per_sample = 1;
    batch_norm_act_kernels().combine_gradients(samples, 0, args.channels);
  }

  Tensor mean;
  Tensor var;
  BatchNormActArgs args{};

 private:
  static Tensor copied(
      const Tensor& maps,
      const std::optional<Tensor>& values,
      const char* name) {
    check_channels(values, maps.size(1), name);
    Tensor result = empty_float(maps, {maps.size(1)});
    if (values) {
      const Tensor from = as_contiguous(*values);
      std::copy_n(
          from.const_data_ptr<float>(),
          from.numel(),
          result.mutable_data_ptr<float>());
    }
    return result;
  }

  std::optional<Tensor> weight_;
  std::optional<Tensor> bias_;
  std::vector<float> zeros_;  // in place of a bias
  std::vector<float> scale_;
  std::optional<Tensor> partial_;
};

}  // namespace dlkernels
