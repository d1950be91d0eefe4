#include "kernels/mbconv_block.h"

#include <cmath>
#include <string>
#include <vector>

#include "../include/nonlinearity_checks.h"
#include "../include/squeeze_excite_checks.h"
#include "depthwise_shape.h"
#include "kernels/squeeze_excite.h"
#include "norm.h"

namespace dlkernels {
namespace {

// Batch norm as a factor and a bias for each channel.
struct FoldedNorm {
  std::vector<float> factor;
  std::vector<float> bias;  // of whole tiles

  FoldedNorm(
      int64_t channels,
      const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias_,
      const Tensor& mean,
      const Tensor& var,
      double eps)
      : factor(channels),
        bias(round_up(channels, mbconv_block_kernels().tile)) {
    check_channels(weight, channels, "weight");
    check_channels(bias_, channels, "bias");
    check_channels(mean, channels, "mean");
    check_channels(var, channels, "var");
    const auto weights = as_contiguous(weight);
    const auto biases = as_contiguous(bias_);
    const Tensor means = as_contiguous(mean);
    const Tensor vars = as_contiguous(var);
    const float* w = floats_or_null(weights);
    const float* b = floats_or_null(biases);
    const float* m = means.const_data_ptr<float>();
    const float* v = vars.const_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
      const float deviation = std::sqrt(v[c] + static_cast<float>(eps));
      factor[c] = (w == nullptr ? 1.0f : w[c]) / deviation;
      bias[c] = (b == nullptr ? 0.0f : b[c]) - m[c] * factor[c];
    }
  }

 private:
  static int64_t round_up(int64_t value, int64_t multiple) {
    return ceil_div(value, multiple) * multiple;
  }
};

// A matrix [rows, depth] of float32 in the layout that products read.
Tensor packed(
    const Tensor& weight_,
    int64_t rows,
    int64_t depth,
    const FoldedNorm& norm,
    const char* name) {
  STD_TORCH_CHECK(
      weight_.dim() == 2 && weight_.size(0) == rows &&
          weight_.size(1) == depth &&
          weight_.scalar_type() == torch::headeronly::ScalarType::Float,
      name,
      " must be a float32 matrix from the channels before it to those after");
  const Tensor weight = as_contiguous(weight_);
  const auto& kernels = mbconv_block_kernels();
  const int64_t tiles = ceil_div(rows, kernels.tile);
  Tensor result = empty_float(weight, {tiles * kernels.tile * depth});
  const PackMatrixArgs args{
      rows,
      depth,
      weight.const_data_ptr<float>(),
      norm.factor.data(),
      result.mutable_data_ptr<float>()};
  parallel_for(tiles, kernels.tile * depth, [&](int64_t begin, int64_t end) {
    kernels.pack_matrix(args, begin, end);
  });
  return result;
}

// Squeeze-and-excitation's two layers, which make gates of pooled maps.
class Excitation {
 public:
  Excitation(
      int64_t channels,
      const Tensor& squeeze_weight,
      const std::optional<Tensor>& squeeze_bias,
      const Tensor& excite_weight,
      const std::optional<Tensor>& excite_bias,
      const std::string& activation,
      const std::string& gate)
      : channels_(channels),
        hidden_(squeeze_weight.dim() == 2 ? squeeze_weight.size(0) : 0),
        squeeze_weight_(as_contiguous(squeeze_weight)),
        excite_weight_(as_contiguous(excite_weight)),
        squeeze_bias_(as_contiguous(squeeze_bias)),
        excite_bias_(as_contiguous(excite_bias)),
        activation_(activation_of(activation)),
        gate_(gate_of(gate)) {
    STD_TORCH_CHECK(
        squeeze_weight.dim() == 2 && squeeze_weight.size(1) == channels &&
            squeeze_weight.scalar_type() ==
                torch::headeronly::ScalarType::Float,
        "squeeze_weight must be float32 of shape [S, C]");
    STD_TORCH_CHECK(
        excite_weight.dim() == 2 && excite_weight.size(0) == channels &&
            excite_weight.size(1) == hidden_ &&
            excite_weight.scalar_type() == torch::headeronly::ScalarType::Float,
        "excite_weight must be float32 of shape [C, S]");
    check_channels(squeeze_bias, hidden_, "squeeze_bias");
    check_channels(excite_bias, channels, "excite_bias");
  }

  // pooled [samples, channels] becomes its gate.
  void apply(int64_t samples, float* pooled) const {
    const auto& kernels = squeeze_excite_kernels();
    std::vector<float> hidden(samples * hidden_);
    linear(
        samples,
        channels_,
        hidden_,
        pooled,
        squeeze_weight_,
        squeeze_bias_,
        hidden.data());
    kernels.activate(activation_, hidden.data(), hidden.data(), hidden.size());
    linear(
        samples,
        hidden_,
        channels_,
        hidden.data(),
        excite_weight_,
        excite_bias_,
        pooled);
    kernels.gate(gate_, pooled, samples * channels_);
  }

 private:
  static void linear(
      int64_t rows,
      int64_t in_features,
      int64_t out_features,
      const float* in,
      const Tensor& weight,
      const std::optional<Tensor>& bias,
      float* out) {
    const LinearArgs args{
        ScalarType::Float,
        rows,
        in_features,
        out_features,
        in,
        weight.const_data_ptr(),
        data_or_null(bias),
        out};
    parallel_for(
        ceil_div(out_features, kLinearBlock),
        rows * in_features * kLinearBlock / 8,
        [&](int64_t begin, int64_t end) {
          squeeze_excite_kernels().linear(args, begin, end);
        });
  }

  int64_t channels_;
  int64_t hidden_;
  Tensor squeeze_weight_;
  Tensor excite_weight_;
  std::optional<Tensor> squeeze_bias_;
  std::optional<Tensor> excite_bias_;
  Activation activation_;
  Gate gate_;
};

using Pass = void (*)(const MbconvBlockArgs&, float*, int64_t, int64_t);

// Gives each thread scratch memory of its own.
void run(
    const MbconvBlockArgs& args, Pass pass, int64_t items, int64_t products) {
  const int64_t floats = mbconv_block_kernels().scratch_floats(args);
  constexpr int64_t kProductsPerCost = 8;
  parallel_for(
      items,
      products / kProductsPerCost / std::max<int64_t>(1, items),
      [&](int64_t begin, int64_t end) {
        const ScratchMemory memory(floats);
        pass(args, memory.data(), begin, end);
      });
}

// As many samples as have their hidden maps in the second-level caches, whole
// ones for each thread.
int64_t samples_at_a_time(int64_t samples, int64_t floats_per_sample) {
  constexpr int64_t kFloatsPerThread = 1 << 18;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fitting =
      std::max<int64_t>(1, kFloatsPerThread / floats_per_sample);
  return std::min(samples, threads * fitting);
}

// How many items a sample is to have, so that threads have equal shares. Not by
// the number of threads, on which no bit of a result may depend.
int64_t items_per_sample(int64_t samples, int64_t tiles, int64_t most) {
  constexpr int64_t kItems = 12;
  return std::clamp<int64_t>(ceil_div(kItems, samples * tiles), 1, most);
}

// pooled [samples, channels] from the sums of bands.
void combine_bands(const MbconvBlockArgs& args, float* pooled) {
  const DepthwiseShape& shape = args.shape;
  const int64_t pitch = groups_of(shape) * kGroup;
  const float area = static_cast<float>(shape.out_height * shape.out_width);
  for (int64_t n = 0; n < shape.samples; ++n) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      float sum = 0.0f;
      for (int64_t band = 0; band < args.bands; ++band) {
        sum += args.pooled[(n * args.bands + band) * pitch + c];
      }
      pooled[n * shape.channels + c] = sum / area;
    }
  }
}

// Runs the block over the samples of args, from x to out.
void run_samples(MbconvBlockArgs& args, const Excitation* excitation) {
  const auto& kernels = mbconv_block_kernels();
  const DepthwiseShape& shape = args.shape;
  const int64_t area = shape.height * shape.width;
  const int64_t out_area = shape.out_height * shape.out_width;
  const int64_t tiles = ceil_div(shape.channels, kernels.tile);
  const int64_t out_tiles = ceil_div(args.out_channels, kernels.tile);
  const int64_t in_groups = ceil_div(args.in_channels, kGroup);
  parallel_for(
      shape.samples * in_groups,
      area * kGroup,
      [&](int64_t begin, int64_t end) { kernels.gather(args, begin, end); });

  const int64_t groups = groups_of(shape);
  std::vector<float> sums;
  std::vector<float> gates;
  if (excitation != nullptr) {
    sums.resize(shape.samples * args.bands * groups * kGroup);
    args.pooled = sums.data();
  }
  const int64_t taps = shape.kernel * shape.kernel;
  run(args,
      kernels.convolve,
      shape.samples * tiles * args.bands,
      shape.samples * shape.channels *
          (area * args.in_channels + out_area * taps));
  if (excitation != nullptr) {
    gates.resize(shape.samples * shape.channels);
    combine_bands(args, gates.data());
    excitation->apply(shape.samples, gates.data());
    args.gate = gates.data();
  }
  run(args,
      kernels.project,
      shape.samples * out_tiles * args.parts,
      shape.samples * out_area * shape.channels * args.out_channels);
}

Tensor mbconv_block(
    const Tensor& x_,
    const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_norm_weight,
    const std::optional<Tensor>& expand_norm_bias,
    const std::optional<Tensor>& expand_mean,
    const std::optional<Tensor>& expand_var,
    double expand_eps,
    const std::string& expand_activation,
    const Tensor& depthwise_weight_,
    const std::optional<Tensor>& depthwise_norm_weight,
    const std::optional<Tensor>& depthwise_norm_bias,
    const Tensor& depthwise_mean,
    const Tensor& depthwise_var,
    double depthwise_eps,
    const std::string& depthwise_activation,
    const std::optional<Tensor>& squeeze_weight,
    const std::optional<Tensor>& squeeze_bias,
    const std::optional<Tensor>& excite_weight,
    const std::optional<Tensor>& excite_bias,
    const std::string& squeeze_activation,
    const std::string& gate,
    const Tensor& project_weight,
    const std::optional<Tensor>& project_norm_weight,
    const std::optional<Tensor>& project_norm_bias,
    const Tensor& project_mean,
    const Tensor& project_var,
    double project_eps,
    int64_t stride,
    const std::vector<int64_t>& padding,
    bool residual) {
  STD_TORCH_CHECK(x_.dim() == 4, "x must have shape [N, C, H, W]");
  STD_TORCH_CHECK(
      expand_weight.has_value() == expand_mean.has_value() &&
          expand_weight.has_value() == expand_var.has_value(),
      "expand_weight, expand_mean and expand_var must be given all or none");
  STD_TORCH_CHECK(
      squeeze_weight.has_value() == excite_weight.has_value(),
      "squeeze_weight and excite_weight must be given both or neither");
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const int64_t in_channels = x.size(1);
  const int64_t channels = expand_weight ? expand_weight->size(0) : in_channels;
  const int64_t out_channels = project_weight.size(0);
  const DepthwiseShape shape =
      depthwise_shape(x, channels, depthwise_weight_, stride, padding);
  Tensor out = empty_outputs(x, shape, out_channels, format);
  STD_TORCH_CHECK(
      !residual ||
          (out_channels == in_channels && shape.out_height == shape.height &&
           shape.out_width == shape.width),
      "a residual needs an output of the shape of x");

  std::optional<Tensor> expand;
  std::vector<float> expand_bias;
  if (expand_weight) {
    FoldedNorm norm(
        channels,
        expand_norm_weight,
        expand_norm_bias,
        *expand_mean,
        *expand_var,
        expand_eps);
    expand =
        packed(*expand_weight, channels, in_channels, norm, "expand_weight");
    expand_bias = std::move(norm.bias);
  }
  const FoldedNorm depthwise_norm(
      channels,
      depthwise_norm_weight,
      depthwise_norm_bias,
      depthwise_mean,
      depthwise_var,
      depthwise_eps);
  const Tensor depthwise_weight = as_contiguous(depthwise_weight_);
  const std::vector<float> depthwise = grouped(
      shape,
      depthwise_weight.const_data_ptr<float>(),
      depthwise_norm.factor.data());
  const FoldedNorm project_norm(
      out_channels,
      project_norm_weight,
      project_norm_bias,
      project_mean,
      project_var,
      project_eps);
  const Tensor project = packed(
      project_weight, out_channels, channels, project_norm, "project_weight");
  std::optional<Excitation> excitation;
  if (squeeze_weight) {
    excitation.emplace(
        channels,
        *squeeze_weight,
        squeeze_bias,
        *excite_weight,
        excite_bias,
        squeeze_activation,
        gate);
  }
  if (shape.samples == 0) {
    return out;
  }

  const int64_t area = shape.height * shape.width;
  const int64_t out_area = shape.out_height * shape.out_width;
  const int64_t input_floats =
      ceil_div(in_channels, kGroup) * (area + kPixelSlack) * kGroup;
  const int64_t hidden_floats =
      groups_of(shape) * (out_area + kPixelSlack) * kGroup;
  const int64_t most =
      samples_at_a_time(shape.samples, input_floats + hidden_floats);
  Tensor input = empty_float(x, {most * input_floats});
  Tensor hidden = empty_float(x, {most * hidden_floats});
  const int64_t tile = mbconv_block_kernels().tile;
  MbconvBlockArgs args{
      shape,
      in_channels,
      out_channels,
      format == MemoryFormat::ChannelsLast,
      residual,
      nonlinearity_of(expand_activation),
      nonlinearity_of(depthwise_activation),
      expand ? expand->const_data_ptr<float>() : nullptr,
      expand_bias.data(),
      depthwise.data(),
      depthwise_norm.bias.data(),
      project.const_data_ptr<float>(),
      project_norm.bias.data(),
      nullptr,
      input.mutable_data_ptr<float>(),
      hidden.mutable_data_ptr<float>(),
      nullptr,
      nullptr,
      nullptr,
      items_per_sample(
          shape.samples,
          ceil_div(channels, tile),
          std::max<int64_t>(1, shape.out_height / shape.kernel)),
      items_per_sample(
          shape.samples,
          ceil_div(out_channels, tile),
          ceil_div(out_area, tile))};
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = shape.dtype == ScalarType::Float ? 4 : 2;
  for (int64_t n = 0; n < shape.samples; n += most) {
    args.shape.samples = std::min(most, shape.samples - n);
    args.x = from + n * in_channels * area * bytes;
    args.out = to + n * out_channels * out_area * bytes;
    run_samples(args, excitation ? &*excitation : nullptr);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("mbconv_block", TORCH_BOX(&mbconv_block));
}

}  // namespace dlkernels
