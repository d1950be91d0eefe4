#include "kernels/pointwise_conv.h"

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../include/nonlinearity_checks.h"
#include "scratch.h"

namespace dlkernels {
namespace {

using Floats = std::vector<float>;

// Of 1x1 convolutions, tiles may span samples unless these have gates.
Tiling tiling_for(const Tensor& maps, bool by_sample) {
  const Grid grid = grid_of(maps);
  return by_sample ? tiling_of_samples(grid) : tiling_of(grid, 1);
}

void check_weight(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(
      x.dim() == 4 && weight.dim() == 2 && weight.size(1) == x.size(1) &&
          weight.size(0) > 0 && weight.size(1) > 0 &&
          weight.scalar_type() == x.scalar_type(),
      "weight must have shape [O, C], at least one of each, and the dtype of "
      "x");
}

std::optional<Tensor> checked_gate(
    const Tensor& x, const std::optional<Tensor>& gate) {
  STD_TORCH_CHECK(
      !gate || (gate->dim() == 2 && gate->size(0) == x.size(0) &&
                gate->size(1) == x.size(1) &&
                gate->scalar_type() == torch::headeronly::ScalarType::Float),
      "gate must be float32 of shape [N, C]");
  return as_contiguous(gate);
}

const float* floats_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

Tensor pack(const Tensor& weight_, bool transposed) {
  const Tensor weight = as_contiguous(weight_);
  const int64_t out = weight.size(0), in = weight.size(1);
  const int64_t rows = transposed ? out : in;
  const int64_t columns = transposed ? in : out;
  Tensor packed = empty_float(weight, {packed_weight_size(rows, columns)});
  const PackWeightArgs args{
      weight.const_data_ptr(),
      scalar_type_of(weight, "weight"),
      in,
      out,
      transposed,
      packed.mutable_data_ptr<float>()};
  parallel_for(
      group_count(columns),
      rows * kChannelGroup,
      [&](int64_t begin, int64_t end) {
        pointwise_conv_kernels().pack(args, begin, end);
      });
  return packed;
}

Tensor empty_of(const Tensor& like, int64_t channels, MemoryFormat format) {
  const std::array<int64_t, 4> sizes{
      like.size(0), channels, like.size(2), like.size(3)};
  return torch::stable::empty(
      sizes,
      like.scalar_type(),
      std::nullopt,
      like.device(),
      std::nullopt,
      format);
}

Tensor pointwise_conv(
    const Tensor& x_,
    const Tensor& weight,
    const std::optional<Tensor>& gate_) {
  check_weight(x_, weight);
  const auto gate = checked_gate(x_, gate_);
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const int64_t inputs = weight.size(1), outputs = weight.size(0);
  Tensor out = empty_of(x, outputs, format);
  const Tiling tiling = tiling_for(x, gate.has_value());
  const Tensor packed = pack(weight, false);
  const Scratch scratch(x, pointwise_scratch_size(tiling, inputs, outputs));
  const PointwiseConvArgs args{
      tiling,
      slice_of(x, 0, inputs),
      floats_or_null(gate),
      packed.const_data_ptr<float>(),
      slice_of(out, 0, outputs)};
  for_each_thread(
      tiling.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
        pointwise_conv_kernels().forward(args, scratch.of(thread), begin, end);
      });
  return out;
}

Floats copied(const Tensor& values_, int64_t channels) {
  STD_TORCH_CHECK(
      values_.numel() == channels &&
          values_.scalar_type() == torch::headeronly::ScalarType::Float,
      "norms must have one float32 value per channel");
  const Tensor values = as_contiguous(values_);
  const float* data = values.const_data_ptr<float>();
  return Floats(data, data + channels);
}

// The norm that makes the convolution's input, with statistics that are known.
class Norm {
 public:
  Norm(
      const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias,
      const std::optional<Tensor>& mean,
      const std::optional<Tensor>& var,
      double eps,
      int64_t channels) {
    STD_TORCH_CHECK(
        mean.has_value() == var.has_value(), "mean and var belong together");
    if (!mean) {
      return;
    }
    mean_ = copied(*mean, channels);
    scale_ = weight ? copied(*weight, channels) : Floats(channels, 1.0f);
    shift_ = bias ? copied(*bias, channels) : Floats(channels, 0.0f);
    const Floats variance = copied(*var, channels);
    for (int64_t c = 0; c < channels; ++c) {
      scale_[c] = static_cast<float>(scale_[c] / std::sqrt(variance[c] + eps));
    }
  }

  Affine affine() const {
    return {
        mean_.empty() ? nullptr : mean_.data(), scale_.data(), shift_.data()};
  }

 private:
  Floats mean_;
  Floats scale_;
  Floats shift_;
};

Tensor unpack(
    const Tensor& partial,
    int64_t threads,
    int64_t inputs,
    int64_t outputs,
    const Tensor& weight) {
  Tensor grad_weight = torch::stable::new_empty(weight, {outputs, inputs});
  const UnpackWeightArgs args{
      partial.const_data_ptr<float>(),
      threads,
      inputs,
      outputs,
      grad_weight.mutable_data_ptr(),
      scalar_type_of(weight, "weight")};
  parallel_for(
      group_count(outputs),
      threads * inputs * kChannelGroup,
      [&](int64_t begin, int64_t end) {
        pointwise_conv_kernels().unpack(args, begin, end);
      });
  return grad_weight;
}

// [samples, channels] from the sums over tiles, which divide samples evenly.
Tensor sum_of_tiles(
    const Tensor& like, const Floats& sums, int64_t samples, int64_t channels) {
  Tensor total = empty_float(like, {samples, channels});
  auto* to = total.mutable_data_ptr<float>();
  std::fill(to, to + samples * channels, 0.0f);
  const int64_t row = std::max<int64_t>(1, channels);
  const int64_t rows = static_cast<int64_t>(sums.size()) / row;
  for (int64_t tile = 0; tile < rows; ++tile) {
    float* sample = to + tile * samples / rows * channels;
    for (int64_t c = 0; c < channels; ++c) {
      sample[c] += sums[tile * channels + c];
    }
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv_backward(
    const Tensor& grad_out_,
    const Tensor& x_,
    const Tensor& weight,
    const std::optional<Tensor>& gate_,
    const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias,
    const std::optional<Tensor>& norm_mean,
    const std::optional<Tensor>& norm_var,
    double eps,
    const std::string& activation,
    std::vector<bool> needs) {
  check_weight(x_, weight);
  STD_TORCH_CHECK(needs.size() == 3, "needs must be three flags");
  const int64_t inputs = weight.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(
      grad_out_.dim() == 4 && grad_out_.size(0) == x_.size(0) &&
          grad_out_.size(1) == outputs && grad_out_.size(2) == x_.size(2) &&
          grad_out_.size(3) == x_.size(3) &&
          grad_out_.scalar_type() == x_.scalar_type(),
      "grad_out must have the shape and dtype of the output");
  const auto gate = checked_gate(x_, gate_);
  const Norm norm(norm_weight, norm_bias, norm_mean, norm_var, eps, inputs);
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  Tensor grad_x =
      needs[0] ? empty_maps(x, format) : torch::stable::new_empty(x, {0});
  const Tiling tiling = tiling_for(x, gate.has_value());
  const Tensor packed = pack(weight, true);
  const Scratch scratch(x, pointwise_scratch_size(tiling, inputs, outputs));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = needs[1] ? packed_weight_size(inputs, outputs) : 0;
  Tensor partial = torch::stable::new_zeros(
      x, {threads, size}, torch::headeronly::ScalarType::Float);
  auto* partial_data = partial.mutable_data_ptr<float>();
  const bool wants_gate = needs[2] && gate.has_value();
  Floats gate_sums(wants_gate ? tiling.tiles * inputs : 0);
  const Slice no_maps{};
  const PointwiseConvBackwardArgs args{
      tiling,
      slice_of(x, 0, inputs),
      norm.affine(),
      nonlinearity_of(activation),
      floats_or_null(gate),
      packed.const_data_ptr<float>(),
      slice_of(grad_out, 0, outputs),
      needs[0] ? slice_of(grad_x, 0, inputs) : no_maps,
      wants_gate ? gate_sums.data() : nullptr};
  for_each_thread(
      tiling.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
        float* grad_weight = needs[1] ? partial_data + thread * size : nullptr;
        pointwise_conv_kernels().backward(
            args, grad_weight, scratch.of(thread), begin, end);
      });
  return {
      grad_x,
      needs[1] ? unpack(partial, threads, inputs, outputs, weight)
               : torch::stable::new_empty(x, {0}),
      sum_of_tiles(x, gate_sums, wants_gate ? x.size(0) : 0, inputs)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("pointwise_conv", TORCH_BOX(&pointwise_conv));
  m.impl("pointwise_conv_backward", TORCH_BOX(&pointwise_conv_backward));
}

}  // namespace dlkernels
