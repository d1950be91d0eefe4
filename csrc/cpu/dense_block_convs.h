#pragma once

// The convolutions of a dense block, forward and backward, as its launchers
// string them together.

#include "dense_block.h"

namespace dlkernels {

using Tensors = std::vector<Tensor>;

// What a block computes with: its convolutions, each with the batch norm before
// it, in the order in which they run.
struct Parameters {
  const Tensors& weights;
  const Tensors& norm_weights;
  const Tensors& norm_biases;
  const Tensors& means;  // empty where the batch's own statistics serve
  const Tensors& variances;
  const std::optional<Tensor>& kept;  // by dropout, of all layers
  double dropout;
  double eps;
};

// The shape of a block. A layer is a 1x1 and a 3x3 convolution with a
// bottleneck between them, or a 3x3 convolution alone.
struct Plan {
  Grid grid;
  int64_t layers;
  int64_t inputs;  // channels of x
  int64_t growth;  // channels that each layer adds
  int64_t width;   // channels of the bottlenecks, or 0

  int64_t channels() const {
    return inputs + layers * growth;
  }
  int64_t read_by(int64_t layer) const {
    return inputs + layer * growth;
  }
  int64_t last_conv(int64_t layer) const {
    return width > 0 ? 2 * layer + 1 : layer;
  }
  int64_t pixels() const {
    return grid.samples * grid.height * grid.width;
  }
  // The statistics are those of the block's channels, then of the bottlenecks'.
  int64_t statistics_between(int64_t layer) const {
    return channels() + layer * width;
  }
  int64_t statistics() const {
    return statistics_between(layers);
  }
};

inline void check_norms(const Tensors& tensors, const Tensors& weights) {
  STD_TORCH_CHECK(
      tensors.size() == weights.size(), "every convolution must have a norm");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_per_channel(tensors[i], weights[i].size(1));
  }
}

// `maps` is the block's input, or its output.
inline Plan plan_of(
    const Tensor& maps, bool is_output, const Parameters& parameters) {
  const Tensors& weights = parameters.weights;
  const Grid grid = grid_of(maps);
  STD_TORCH_CHECK(!weights.empty(), "there must be a convolution");
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(
        weight.dim() == 4 && weight.scalar_type() == maps.scalar_type(),
        "weights must have shape [out, in, kernel, kernel] and the dtype of x");
  }
  const bool bottleneck = weights[0].size(2) == 1;
  const int64_t convs = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(!bottleneck || convs % 2 == 0, "a layer lacks a convolution");
  Plan plan{};
  plan.grid = grid;
  plan.layers = bottleneck ? convs / 2 : convs;
  plan.growth = weights[bottleneck ? 1 : 0].size(0);
  plan.width = bottleneck ? weights[0].size(0) : 0;
  plan.inputs = maps.size(1) - (is_output ? plan.layers * plan.growth : 0);
  const auto check =
      [&](int64_t index, int64_t in, int64_t out, int64_t kernel) {
        const Tensor& weight = weights[index];
        STD_TORCH_CHECK(
            weight.size(0) == out && weight.size(1) == in &&
                weight.size(2) == kernel && weight.size(3) == kernel,
            "the channels of the convolutions do not add up");
      };
  for (int64_t layer = 0; layer < plan.layers; ++layer) {
    const int64_t last = plan.last_conv(layer);
    if (bottleneck) {
      check(last - 1, plan.read_by(layer), plan.width, 1);
    }
    check(last, bottleneck ? plan.width : plan.read_by(layer), plan.growth, 3);
  }
  check_norms(parameters.norm_weights, weights);
  check_norms(parameters.norm_biases, weights);
  if (!parameters.means.empty()) {
    check_norms(parameters.means, weights);
    check_norms(parameters.variances, weights);
  }
  STD_TORCH_CHECK(
      !parameters.kept || (parameters.kept->is_contiguous() &&
                           parameters.kept->element_size() == 1 &&
                           parameters.kept->numel() ==
                               plan.layers * plan.pixels() * plan.growth),
      "kept must be a contiguous bool tensor [layers, N, H, W, growth]");
  return plan;
}

inline constexpr Dropout kNoDropout{nullptr, 1.0f};

// The convolutions of a block, each with the norm and ReLU before it; they are
// numbered in the order of their weights.
class Block {
 public:
  Block(
      const Plan& plan,
      const Parameters& parameters,
      const Tensor& like,
      float* mean,
      float* variance)
      : plan_(plan),
        parameters_(parameters),
        like_(like),
        mean_(mean),
        variance_(variance),
        kernels_(dense_block_kernels()),
        tiling_1x1_(tiling_of(plan.grid, 1)),
        tiling_3x3_(tiling_of(plan.grid, 3)),
        scratch_(
            like,
            std::max(
                scratch_size(tiling_1x1_, plan.width),
                scratch_size(tiling_3x3_, plan.growth))) {}

  bool batch_statistics() const {
    return parameters_.means.empty();
  }

  // out = dropout(convolution of relu(norm(in))). The channels of `in` and
  // `out` begin at `in_first` and `out_first` among the statistics; those of
  // `out` are gathered unless out_first is negative.
  void conv(
      int64_t index,
      const Slice& in,
      int64_t in_first,
      const Slice& out,
      int64_t out_first,
      const Dropout& dropout) const {
    const Norm norm_in = norm(index, in_first);
    const Tensor weight = packed(index, false);
    const Tiling& tiling = tiling_of_conv(index);
    Floats moments = room_for_moments(tiling, out_first < 0 ? 0 : out.count);
    const ConvArgs args{
        tiling,
        in,
        norm_in.affine(),
        weight.const_data_ptr<float>(),
        out,
        dropout,
        moments.empty() ? nullptr : moments.data()};
    for_each_thread(
        tiling.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
          kernels_.conv(args, scratch_.of(thread), begin, end);
        });
    keep_moments(tiling, moments, out.count, out_first);
  }

  // Copies x into the block, whose statistics begin with those of x.
  void copy_in(const Slice& x, const Slice& out) const {
    Floats moments = room_for_moments(tiling_1x1_, out.count);
    copy(x, {}, {}, out, moments.empty() ? nullptr : moments.data());
    keep_moments(tiling_1x1_, moments, out.count, 0);
  }

  // out = in + correction(values)
  void copy(
      const Slice& in,
      const Slice& values,
      const Affine& correction,
      const Slice& out,
      float* moments) const {
    const CopyArgs args{tiling_1x1_, in, values, correction, out, moments};
    for_each_thread(
        tiling_1x1_.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
          kernels_.copy(args, scratch_.of(thread), begin, end);
        });
  }

 protected:
  Norm norm(int64_t index, int64_t first) const {
    const bool batch = batch_statistics();
    return Norm(
        batch ? mean_ + first
              : parameters_.means[index].const_data_ptr<float>(),
        batch ? variance_ + first
              : parameters_.variances[index].const_data_ptr<float>(),
        parameters_.norm_weights[index],
        parameters_.norm_biases[index],
        parameters_.eps);
  }

  int64_t kernel(int64_t index) const {
    return parameters_.weights[index].size(2);
  }

  const Tiling& tiling_of_conv(int64_t index) const {
    return kernel(index) == 1 ? tiling_1x1_ : tiling_3x3_;
  }

  Tensor packed(int64_t index, bool transposed) const {
    const MemoryFormat format = memory_format_of(parameters_.weights[index]);
    const Tensor weight = in_format(parameters_.weights[index], format);
    const int64_t out = weight.size(0), in = weight.size(1);
    const int64_t rows = transposed ? out : in;
    const int64_t columns = transposed ? in : out;
    Tensor result =
        empty_float(like_, {packed_size(kernel(index), rows, columns)});
    const PackArgs args{
        weight.const_data_ptr(),
        format == MemoryFormat::ChannelsLast,
        scalar_type_of(weight, "weights"),
        kernel(index),
        in,
        out,
        transposed,
        result.mutable_data_ptr<float>()};
    parallel_for(
        group_count(columns),
        weight.numel() / group_count(columns),
        [&](int64_t begin, int64_t end) { kernels_.pack(args, begin, end); });
    return result;
  }

  const Plan& plan_;
  const Parameters& parameters_;
  const Tensor& like_;
  float* const mean_;
  float* const variance_;
  const DenseBlockKernels& kernels_;
  const Tiling tiling_1x1_;
  const Tiling tiling_3x3_;
  const Scratch scratch_;

 private:
  Floats room_for_moments(const Tiling& tiling, int64_t channels) const {
    return Floats(batch_statistics() ? 2 * channels * tiling.tiles : 0);
  }

  void keep_moments(
      const Tiling& tiling,
      const Floats& moments,
      int64_t channels,
      int64_t first) const {
    if (batch_statistics() && first >= 0) {
      merge_moments(
          tiling, moments.data(), channels, mean_ + first, variance_ + first);
    }
  }
};

// The gradients of a block. What reaches a channel through its statistics is
// summed over all norms that read it, and applied once, as a correction, when
// every reader has had its turn.
class BlockBackward : public Block {
 public:
  BlockBackward(
      const Plan& plan,
      const Parameters& parameters,
      const Tensor& like,
      const Tensor& mean,
      const Tensor& variance)
      : Block(
            plan,
            parameters,
            like,
            mean.mutable_data_ptr<float>(),
            variance.mutable_data_ptr<float>()),
        sums_(plan.statistics()),
        products_(plan.statistics()),
        correction_scale_(plan.statistics()),
        correction_shift_(plan.statistics()) {
    for (size_t index = 0; index < parameters.weights.size(); ++index) {
      weights.push_back(
          as_contiguous(torch::stable::empty_like(parameters.weights[index])));
      norm_weights.push_back(
          torch::stable::empty_like(parameters.norm_weights[index]));
      norm_biases.push_back(
          torch::stable::empty_like(parameters.norm_biases[index]));
    }
  }

  // For `count` channels, from `first` on among the statistics.
  Affine correction(int64_t first, int64_t count) {
    if (!batch_statistics()) {
      return {};
    }
    const double pixels = static_cast<double>(plan_.pixels());
    for (int64_t c = first; c < first + count; ++c) {
      const double precision = 1.0 / (variance_[c] + parameters_.eps);
      correction_scale_[c] =
          static_cast<float>(-precision * products_[c] / pixels);
      correction_shift_[c] = static_cast<float>(-sums_[c] / pixels);
    }
    return {
        mean_ + first,
        correction_scale_.data() + first,
        correction_shift_.data() + first};
  }

  // Gradients of one norm and convolution; see ConvBackwardArgs.
  void conv_backward(
      int64_t index,
      const Slice& in,
      int64_t in_first,
      const Slice& grad_out,
      const Slice& out,
      const Affine& correction,
      const Dropout& dropout,
      const Slice& grad_before,
      const Tensor& grad_in) {
    const Norm norm_in = norm(index, in_first);
    const Tensor weight = packed(index, true);
    const Tiling& tiling = tiling_of_conv(index);
    const int64_t size = gradient_size(kernel(index), in.count, grad_out.count);
    const int64_t threads = torch::stable::get_num_threads();
    Tensor partial = torch::stable::new_zeros(
        like_,
        {threads, size + 2 * in.count},
        torch::headeronly::ScalarType::Float);
    float* weights_data = partial.mutable_data_ptr<float>();
    float* sums_data = weights_data + threads * size;
    const ConvBackwardArgs args{
        tiling,
        in,
        norm_in.affine(),
        weight.const_data_ptr<float>(),
        grad_out,
        out,
        correction,
        dropout,
        grad_before,
        grad_in.mutable_data_ptr<float>(),
        grad_in.size(3)};
    for_each_thread(
        tiling.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
          const ConvGradients gradients{
              weights_data + thread * size, sums_data + thread * 2 * in.count};
          kernels_.conv_backward(
              args, gradients, scratch_.of(thread), begin, end);
        });
    const UnpackArgs unpack{
        weights_data,
        threads,
        kernel(index),
        in.count,
        grad_out.count,
        weights[index].mutable_data_ptr(),
        scalar_type_of(weights[index], "weights")};
    parallel_for(
        group_count(grad_out.count),
        size / group_count(grad_out.count),
        [&](int64_t begin, int64_t end) {
          kernels_.unpack(unpack, begin, end);
        });
    norm_backward(index, norm_in, in_first, sums_data, threads);
  }

  Tensors weights;
  Tensors norm_weights;
  Tensors norm_biases;

 private:
  void norm_backward(
      int64_t index,
      const Norm& norm_in,
      int64_t first,
      const float* partial,
      int64_t threads) {
    float* grad_weight = norm_weights[index].mutable_data_ptr<float>();
    float* grad_bias = norm_biases[index].mutable_data_ptr<float>();
    const int64_t channels = norm_weights[index].numel();
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0, product = 0.0;
      for (int64_t thread = 0; thread < threads; ++thread) {
        const float* sums = partial + thread * 2 * channels;
        sum += sums[c];
        product += sums[channels + c];
      }
      grad_bias[c] = static_cast<float>(sum);
      grad_weight[c] =
          static_cast<float>(product * norm_in.inverse_deviation(c));
      if (batch_statistics()) {
        sums_[first + c] += norm_in.scale(c) * sum;
        products_[first + c] += norm_in.scale(c) * product;
      }
    }
  }

  std::vector<double> sums_;      // of grad_z * scale, per channel
  std::vector<double> products_;  // of grad_z * scale * (x - mean)
  Floats correction_scale_;
  Floats correction_shift_;
};

}  // namespace dlkernels
