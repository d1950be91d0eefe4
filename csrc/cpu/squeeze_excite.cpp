#include <string>
#include <tuple>

#include "../include/squeeze_excite_checks.h"
#include "kernels/squeeze_excite.h"

namespace dlkernels {
namespace {

// A batch of maps, cut into groups of samples that stay in cache between the
// pass that reduces them and the pass that scales them.
class Batch {
 public:
  Batch(const Tensor& x, MemoryFormat format)
      : samples_(x.size(0)),
        maps_{
            scalar_type_of(x, "x"),
            format == MemoryFormat::ChannelsLast,
            x.size(1),
            x.size(2) * x.size(3),
            1},
        sample_bytes_(maps_.channels * maps_.area * x.element_size()) {}

  int64_t samples() const {
    return samples_;
  }
  int64_t channels() const {
    return maps_.channels;
  }

  // Calls body(first sample, number of samples) for each group.
  template <typename Body>
  void for_each_group(const Body& body) const {
    constexpr int64_t kGroupBytes = 6 << 20;
    const int64_t fitting = kGroupBytes / std::max<int64_t>(1, sample_bytes_);
    // Whole samples, one a thread, stream best where channels lie together.
    const int64_t round =
        maps_.channels_last ? torch::stable::get_num_threads() : 1;
    const int64_t size = std::max<int64_t>(1, fitting / round) * round;
    for (int64_t first = 0; first < samples_; first += size) {
      body(first, std::min(size, samples_ - first));
    }
  }

  // Runs pass(maps, begin, end) over the samples of a group, each sample cut
  // into parts that the threads share.
  template <typename Pass>
  void run(int64_t first, int64_t count, const Pass& pass) const {
    Maps maps = maps_;
    const int64_t threads = torch::stable::get_num_threads();
    // Whole samples stream best where channels lie next to each other.
    if (!maps.channels_last || count % threads != 0) {
      const int64_t most = std::max<int64_t>(1, maps.channels / 64);
      maps.parts = std::min(most, ceil_div(4 * threads, count));
    }
    parallel_for(
        count * maps.parts,
        maps.channels * maps.area / maps.parts,
        [&](int64_t begin, int64_t end) {
          const int64_t offset = first * maps.parts;
          pass(maps, begin + offset, end + offset);
        });
  }

 private:
  int64_t samples_;
  Maps maps_;
  int64_t sample_bytes_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite(
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
  const Activation activation = activation_of(activation_name);
  const Gate gate = gate_of(gate_name);

  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor reduce_weight = as_contiguous(reduce_weight_);
  const Tensor expand_weight = as_contiguous(expand_weight_);
  const auto reduce_bias = as_contiguous(reduce_bias_);
  const auto expand_bias = as_contiguous(expand_bias_);
  const auto shortcut = in_format(shortcut_, format);

  const Batch batch(x, format);
  const int64_t channels = batch.channels();
  const int64_t squeezed = reduce_weight.size(0);
  Tensor out = empty_maps(x, format);
  Tensor pooled = empty_float(x, {batch.samples(), channels});
  Tensor hidden = empty_float(x, {batch.samples(), squeezed});
  Tensor scale = empty_float(x, {batch.samples(), channels});
  Tensor activated = empty_float(x, {batch.samples(), squeezed});

  const auto& kernels = squeeze_excite_kernels();
  const void* x_data = x.const_data_ptr();
  auto* pooled_data = pooled.mutable_data_ptr<float>();
  auto* hidden_data = hidden.mutable_data_ptr<float>();
  auto* scale_data = scale.mutable_data_ptr<float>();
  auto* activated_data = activated.mutable_data_ptr<float>();
  const void* shortcut_data = data_or_null(shortcut);
  void* out_data = out.mutable_data_ptr();

  batch.for_each_group([&](int64_t first, int64_t count) {
    batch.run(first, count, [&](const Maps& maps, int64_t begin, int64_t end) {
      kernels.pool(maps, x_data, pooled_data, begin, end);
    });
    const LinearArgs reduce{
        scalar_type_of(x, "x"),
        count,
        channels,
        squeezed,
        pooled_data + first * channels,
        reduce_weight.const_data_ptr(),
        data_or_null(reduce_bias),
        hidden_data + first * squeezed};
    parallel_for(squeezed, count * channels, [&](int64_t begin, int64_t end) {
      kernels.linear(reduce, begin, end);
    });
    kernels.activate(
        activation,
        hidden_data + first * squeezed,
        activated_data + first * squeezed,
        count * squeezed);
    const LinearArgs expand{
        scalar_type_of(x, "x"),
        count,
        squeezed,
        channels,
        activated_data + first * squeezed,
        expand_weight.const_data_ptr(),
        data_or_null(expand_bias),
        scale_data + first * channels};
    parallel_for(channels, count * squeezed, [&](int64_t begin, int64_t end) {
      kernels.linear(expand, begin, end);
    });
    kernels.gate(gate, scale_data + first * channels, count * channels);
    batch.run(first, count, [&](const Maps& maps, int64_t begin, int64_t end) {
      const ScaleArgs args{
          maps,
          x_data,
          scale_data,
          shortcut_data,
          output_activation == "relu",
          out_data};
      kernels.scale(args, begin, end);
    });
  });
  return {out, pooled, hidden, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
squeeze_excite_backward(
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
  const Activation activation = activation_of(activation_name);
  const Gate gate = gate_of(gate_name);

  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  const Tensor grad_out = in_format(grad_out_, format);
  const auto out = in_format(out_, format);
  const Tensor reduce_weight = as_contiguous(reduce_weight_);
  const Tensor expand_weight = as_contiguous(expand_weight_);
  const Tensor pooled = as_contiguous(pooled_);
  const Tensor hidden = as_contiguous(hidden_);
  const Tensor scale = as_contiguous(scale_);

  const Batch batch(x, format);
  const int64_t samples = batch.samples();
  const int64_t channels = batch.channels();
  const int64_t squeezed = reduce_weight.size(0);
  Tensor grad_x = empty_maps(x, format);
  Tensor grad_shortcut =
      shortcut_grad ? empty_maps(x, format) : torch::stable::new_empty(x, {0});
  Tensor grad_reduce_weight = torch::stable::new_empty(x, {squeezed, channels});
  Tensor grad_reduce_bias = torch::stable::new_empty(x, {squeezed});
  Tensor grad_expand_weight = torch::stable::new_empty(x, {channels, squeezed});
  Tensor grad_expand_bias = torch::stable::new_empty(x, {channels});
  // Gradients of what the gate and the inner activation were applied to.
  Tensor grad_logits = empty_float(x, {samples, channels});
  Tensor grad_hidden = empty_float(x, {samples, squeezed});
  Tensor grad_pooled = empty_float(x, {samples, channels});
  Tensor activated = empty_float(x, {samples, squeezed});

  const auto& kernels = squeeze_excite_kernels();
  const ScalarType dtype = scalar_type_of(x, "x");
  const void* x_data = x.const_data_ptr();
  const void* grad_out_data = grad_out.const_data_ptr();
  const void* out_data = data_or_null(out);
  const float* pooled_data = pooled.const_data_ptr<float>();
  const float* hidden_data = hidden.const_data_ptr<float>();
  const float* scale_data = scale.const_data_ptr<float>();
  auto* grad_logits_data = grad_logits.mutable_data_ptr<float>();
  auto* grad_hidden_data = grad_hidden.mutable_data_ptr<float>();
  auto* grad_pooled_data = grad_pooled.mutable_data_ptr<float>();
  auto* activated_data = activated.mutable_data_ptr<float>();
  void* grad_x_data = grad_x.mutable_data_ptr();
  void* grad_shortcut_data =
      shortcut_grad ? grad_shortcut.mutable_data_ptr() : nullptr;

  batch.for_each_group([&](int64_t first, int64_t count) {
    batch.run(first, count, [&](const Maps& maps, int64_t begin, int64_t end) {
      kernels.pool_backward(
          maps, grad_out_data, out_data, x_data, grad_logits_data, begin, end);
    });
    kernels.gate_backward(
        gate,
        scale_data + first * channels,
        grad_logits_data + first * channels,
        count * channels);
    const LinearArgs expand{
        dtype,
        count,
        squeezed,
        channels,
        grad_logits_data + first * channels,
        expand_weight.const_data_ptr(),
        nullptr,
        grad_hidden_data + first * squeezed};
    parallel_for(
        ceil_div(squeezed, kLinearBlock),
        count * channels * kLinearBlock,
        [&](int64_t begin, int64_t end) {
          kernels.linear_backward(expand, begin, end);
        });
    kernels.activate_backward(
        activation,
        hidden_data + first * squeezed,
        grad_hidden_data + first * squeezed,
        count * squeezed);
    const LinearArgs reduce{
        dtype,
        count,
        channels,
        squeezed,
        grad_hidden_data + first * squeezed,
        reduce_weight.const_data_ptr(),
        nullptr,
        grad_pooled_data + first * channels};
    parallel_for(
        ceil_div(channels, kLinearBlock),
        count * squeezed * kLinearBlock,
        [&](int64_t begin, int64_t end) {
          kernels.linear_backward(reduce, begin, end);
        });
    batch.run(first, count, [&](const Maps& maps, int64_t begin, int64_t end) {
      const ScaleBackwardArgs args{
          maps,
          grad_out_data,
          out_data,
          x_data,
          scale_data,
          grad_pooled_data,
          grad_x_data,
          grad_shortcut_data};
      kernels.scale_backward(args, begin, end);
    });
  });

  kernels.activate(activation, hidden_data, activated_data, samples * squeezed);
  const auto weight_backward = [&](const float* in,
                                   int64_t in_features,
                                   float* grad,
                                   int64_t out_features,
                                   const Tensor& grad_weight,
                                   const Tensor& grad_bias) {
    const LinearArgs args{
        dtype, samples, in_features, out_features, in, nullptr, nullptr, grad};
    void* weight_data = grad_weight.mutable_data_ptr();
    void* bias_data = grad_bias.mutable_data_ptr();
    parallel_for(
        out_features, samples * in_features, [&](int64_t begin, int64_t end) {
          kernels.linear_weight_backward(
              args, weight_data, bias_data, begin, end);
        });
  };
  weight_backward(
      activated_data,
      squeezed,
      grad_logits_data,
      channels,
      grad_expand_weight,
      grad_expand_bias);
  weight_backward(
      pooled_data,
      channels,
      grad_hidden_data,
      squeezed,
      grad_reduce_weight,
      grad_reduce_bias);
  return {
      grad_x,
      grad_reduce_weight,
      grad_reduce_bias,
      grad_expand_weight,
      grad_expand_bias,
      grad_shortcut};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("squeeze_excite", TORCH_BOX(&squeeze_excite));
  m.impl("squeeze_excite_backward", TORCH_BOX(&squeeze_excite_backward));
}

}  // namespace dlkernels
