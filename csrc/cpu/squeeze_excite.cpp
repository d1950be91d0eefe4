#include <unistd.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "../include/squeeze_excite_checks.h"
#include "kernels/squeeze_excite.h"

namespace dlkernels {
namespace {

int64_t element_size(const Tensor& tensor) {
  return static_cast<int64_t>(tensor.element_size());
}

// The cache that a core has to itself.
int64_t core_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    const int64_t known = 0;
#endif
    return known > 0 ? known : int64_t{1} << 20;
  }();
  return bytes;
}

// A batch of maps, cut into groups of samples that stay in cache between the
// pass that reduces them and the pass that scales them. Each thread works
// through groups of its own: of samples that fit its core's cache, else of some
// that its share of the cache for all cores holds. Samples that are left over
// when all threads have the same number are divided among the threads, and all
// are where only that makes them fit the cores' caches, and where threads that
// wait for each other after every pass cost little beside it.
class Batch {
 public:
  // A thread's share of the cache for all cores, about.
  static constexpr int64_t kSharedCacheBytes = 4 << 20;
  // A pass over less is too short for threads to wait for each other.
  static constexpr int64_t kMinPartBytes = 3 << 18;
  // Results of that size are not found in cache by whoever reads them next.
  static constexpr int64_t kStreamedBytes = 16 << 20;
  // Cache lines that are streamed in part are slow: many of a short run's are.
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kLongRunBytes = 8 << 10;

  // A group reads `weight_bytes` of weights.
  Batch(const Tensor& x, MemoryFormat format, int64_t weight_bytes)
      : threads_(torch::stable::get_num_threads()),
        samples_(x.size(0)),
        maps_{
            scalar_type_of(x, "x"),
            format == MemoryFormat::ChannelsLast,
            x.size(1),
            x.size(2) * x.size(3),
            /*parts=*/1,
            /*streamed=*/false},
        bytes_(maps_.channels * maps_.area * element_size(x)) {
    const int64_t run_bytes =
        (maps_.channels_last ? maps_.channels : maps_.area) * element_size(x);
    maps_.streamed =
        samples_ * bytes_ >= kStreamedBytes &&
        (run_bytes % kLineBytes == 0 || run_bytes >= kLongRunBytes);
    const int64_t cache_bytes =
        bytes_ <= core_cache_bytes() ? core_cache_bytes() : kSharedCacheBytes;
    const int64_t group_bytes = std::max(cache_bytes, weight_bytes);
    const int64_t fitting =
        std::max<int64_t>(1, group_bytes / std::max<int64_t>(1, bytes_));
    const int64_t groups =
        std::max<int64_t>(1, ceil_div(per_thread(), fitting));
    group_size_ = std::max<int64_t>(1, ceil_div(per_thread(), groups));
  }

  int64_t samples() const {
    return samples_;
  }
  int64_t channels() const {
    return maps_.channels;
  }

  // Calls body(maps, first sample, number of samples) for each group; maps
  // tells into how many parts its samples are to be divided.
  template <typename Body>
  void for_each_group(const Body& body) const {
    const int64_t whole = per_thread() * threads_;
    parallel_for(
        per_thread() > 0 ? threads_ : 0,
        per_thread() * maps_.channels * maps_.area,
        [&](int64_t begin, int64_t end) {
          const int64_t last = end * per_thread();
          for (int64_t first = begin * per_thread(); first < last;
               first += group_size_) {
            body(maps_, first, std::min(group_size_, last - first));
          }
        });
    Maps divided = maps_;
    divided.parts = parts();
    for (int64_t first = whole; first < samples_; ++first) {
      body(divided, first, 1);
    }
  }

  // Into how many parts a sample is divided at most.
  int64_t parts() const {
    const int64_t extent = maps_.channels_last ? maps_.area : maps_.channels;
    return std::max<int64_t>(1, std::min(threads_, extent));
  }

  // Where the maps of a sample begin.
  template <typename T>
  T* at(int64_t sample, T* maps) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return maps == nullptr ? nullptr
                           : static_cast<Byte*>(maps) + sample * bytes_;
  }

 private:
  // How many whole samples a thread gets.
  int64_t per_thread() const {
    const int64_t part = bytes_ / threads_;
    const bool is_divided = bytes_ > core_cache_bytes() &&
                            part >= kMinPartBytes && part <= core_cache_bytes();
    return is_divided ? 0 : samples_ / threads_;
  }

  int64_t threads_;
  int64_t samples_;
  Maps maps_;
  int64_t bytes_;  // of a sample
  int64_t group_size_;
};

// Runs pass(begin, end) over the parts of a group's samples. A part goes to the
// same thread in every pass.
template <typename Pass>
void run(const Maps& maps, int64_t count, const Pass& pass) {
  parallel_for(
      count * maps.parts, maps.channels * maps.area / maps.parts, pass);
}

// Runs pass(begin, end) over the blocks of `features`.
template <typename Pass>
void run_linear(const LinearArgs& args, int64_t features, const Pass& pass) {
  parallel_for(
      ceil_div(features, kLinearBlock),
      args.rows * args.in_features * args.out_features / 16 * kLinearBlock /
          std::max<int64_t>(1, features),
      pass);
}

int64_t weight_bytes(const Tensor& reduce_weight) {
  return 2 * reduce_weight.numel() * element_size(reduce_weight);
}

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

  const Batch batch(x, format, weight_bytes(reduce_weight));
  const int64_t channels = batch.channels();
  const int64_t squeezed = reduce_weight.size(0);
  Tensor out = empty_maps(x, format);
  Tensor sums = empty_float(x, {batch.samples(), batch.parts(), channels});
  Tensor pooled = empty_float(x, {batch.samples(), channels});
  Tensor hidden = empty_float(x, {batch.samples(), squeezed});
  Tensor scale = empty_float(x, {batch.samples(), channels});
  Tensor activated = empty_float(x, {batch.samples(), squeezed});

  const auto& kernels = squeeze_excite_kernels();
  const void* x_data = x.const_data_ptr();
  auto* sums_data = sums.mutable_data_ptr<float>();
  auto* pooled_data = pooled.mutable_data_ptr<float>();
  auto* hidden_data = hidden.mutable_data_ptr<float>();
  auto* scale_data = scale.mutable_data_ptr<float>();
  auto* activated_data = activated.mutable_data_ptr<float>();
  const void* shortcut_data = data_or_null(shortcut);
  void* out_data = out.mutable_data_ptr();

  batch.for_each_group([&](const Maps& maps, int64_t first, int64_t count) {
    float* group_sums = sums_data + first * channels * batch.parts();
    float* group_pooled = pooled_data + first * channels;
    run(maps, count, [&](int64_t begin, int64_t end) {
      kernels.pool(maps, batch.at(first, x_data), group_sums, begin, end);
    });
    kernels.combine(
        maps,
        count,
        group_sums,
        1.0f / static_cast<float>(maps.area),
        group_pooled);
    const LinearArgs reduce{
        scalar_type_of(x, "x"),
        count,
        channels,
        squeezed,
        group_pooled,
        reduce_weight.const_data_ptr(),
        data_or_null(reduce_bias),
        hidden_data + first * squeezed};
    run_linear(reduce, squeezed, [&](int64_t begin, int64_t end) {
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
    run_linear(expand, channels, [&](int64_t begin, int64_t end) {
      kernels.linear(expand, begin, end);
    });
    kernels.gate(gate, scale_data + first * channels, count * channels);
    const ScaleArgs args{
        maps,
        batch.at(first, x_data),
        scale_data + first * channels,
        batch.at(first, shortcut_data),
        output_activation == "relu",
        batch.at(first, out_data)};
    run(maps, count, [&](int64_t begin, int64_t end) {
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

  const Batch batch(x, format, weight_bytes(reduce_weight));
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
  Tensor sums = empty_float(x, {batch.samples(), batch.parts(), channels});

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
  auto* sums_data = sums.mutable_data_ptr<float>();
  void* grad_x_data = grad_x.mutable_data_ptr();
  void* grad_shortcut_data =
      shortcut_grad ? grad_shortcut.mutable_data_ptr() : nullptr;

  batch.for_each_group([&](const Maps& maps, int64_t first, int64_t count) {
    float* group_sums = sums_data + first * channels * batch.parts();
    run(maps, count, [&](int64_t begin, int64_t end) {
      kernels.pool_backward(
          maps,
          batch.at(first, grad_out_data),
          batch.at(first, out_data),
          batch.at(first, x_data),
          group_sums,
          begin,
          end);
    });
    kernels.combine(
        maps, count, group_sums, 1.0f, grad_logits_data + first * channels);
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
    run_linear(expand, squeezed, [&](int64_t begin, int64_t end) {
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
    run_linear(reduce, channels, [&](int64_t begin, int64_t end) {
      kernels.linear_backward(reduce, begin, end);
    });
    const ScaleBackwardArgs args{
        maps,
        batch.at(first, grad_out_data),
        batch.at(first, out_data),
        scale_data + first * channels,
        grad_pooled_data + first * channels,
        batch.at(first, grad_x_data),
        batch.at(first, grad_shortcut_data)};
    run(maps, count, [&](int64_t begin, int64_t end) {
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
    run_linear(args, out_features, [&](int64_t begin, int64_t end) {
      kernels.linear_weight_backward(args, weight_data, bias_data, begin, end);
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
