#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../include/tensor.h"
#include "kernels/asff.h"

namespace dlkernels {
namespace {

void check_level(const Tensor& x, const Tensor& first, const Tensor& logits) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(0) == logits.size(0) &&
          x.size(1) == first.size(1) && x.size(2) > 0 && x.size(3) > 0,
      "every feature must have shape [N, C, H / s, W / s]");
  STD_TORCH_CHECK(
      x.scalar_type() == logits.scalar_type(),
      "features and logits must have one dtype");
  const int64_t factor = logits.size(2) / x.size(2);
  STD_TORCH_CHECK(
      (factor == 1 || factor == 2 || factor == 4 || factor == 8) &&
          x.size(2) * factor == logits.size(2) &&
          x.size(3) * factor == logits.size(3),
      "the size of logits must be that of every feature times 1, 2, 4 or 8");
}

// The arguments, in the memory format of the largest feature.
struct Inputs {
  std::vector<Tensor> features;
  MemoryFormat format;
  Tensor logits;
  MemoryFormat logits_format;
  Pyramid pyramid;

  Inputs(
      const std::vector<Tensor>& features_,
      const Tensor& logits_,
      const std::string& mode) {
    STD_TORCH_CHECK(
        features_.size() >= 2 && features_.size() <= kMaxLevels,
        "features must hold 2 to 5 maps");
    STD_TORCH_CHECK(
        logits_.dim() == 4 &&
            logits_.size(1) == static_cast<int64_t>(features_.size()),
        "logits must have shape [N, L, H, W], one channel per feature");
    STD_TORCH_CHECK(
        mode == "nearest" || mode == "bilinear",
        "mode must be nearest or bilinear, but is ",
        mode);
    const Tensor* finest = &features_[0];
    for (const Tensor& x : features_) {
      check_level(x, features_[0], logits_);
      finest = x.size(2) > finest->size(2) ? &x : finest;
    }
    format = memory_format_of(*finest);
    logits_format = memory_format_of(logits_);
    logits = in_format(logits_, logits_format);
    pyramid = {
        scalar_type_of(logits, "logits"),
        format == MemoryFormat::ChannelsLast,
        mode == "bilinear",
        finest->size(1),
        logits.size(2),
        logits.size(3),
        1,
        0,
        {}};
    for (const Tensor& x : features_) {
      features.push_back(in_format(x, format));
      const int64_t factor = pyramid.height / x.size(2);
      pyramid.coarsest = std::max(pyramid.coarsest, factor);
      pyramid.levels[pyramid.num_levels++] = {
          features.back().const_data_ptr(), nullptr, factor};
    }
  }

  int64_t samples() const {
    return logits.size(0);
  }
  int64_t rows() const {
    return samples() * pyramid.height;
  }
  int64_t row_size() const {
    return pyramid.channels * pyramid.width;
  }
  int64_t plane_size() const {
    return pyramid.height * pyramid.width;
  }
  Logits logits_layout() const {
    return {
        pyramid.dtype,
        logits_format == MemoryFormat::ChannelsLast,
        pyramid.num_levels,
        pyramid.height,
        pyramid.width};
  }

  // [samples, parts, levels, height, width]
  Tensor empty_weights(int64_t parts = 1) const {
    return empty_float(
        logits,
        {samples(), parts, pyramid.num_levels, pyramid.height, pyramid.width});
  }

  Tensor weights() const {
    Tensor weights = empty_weights();
    const Logits layout = logits_layout();
    const void* from = logits.const_data_ptr();
    auto* to = weights.mutable_data_ptr<float>();
    parallel_for(
        rows(),
        16 * pyramid.num_levels * pyramid.width,
        [&](int64_t begin, int64_t end) {
          asff_kernels().softmax(layout, from, to, begin, end);
        });
    return weights;
  }
};

Tensor empty_maps_of(
    const Tensor& like,
    std::initializer_list<int64_t> sizes,
    MemoryFormat format) {
  return torch::stable::empty(
      sizes,
      like.scalar_type(),
      std::nullopt,
      like.device(),
      std::nullopt,
      format);
}

struct Free {
  void operator()(float* memory) const {
    std::free(memory);
  }
};

// Memory for one thread, aligned to the widest vectors.
std::unique_ptr<float, Free> make_scratch(const Pyramid& pyramid) {
  const size_t bytes = sizeof(float) * scratch_of(pyramid).size;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes");
  return std::unique_ptr<float, Free>(memory);
}

Tensor asff_fuse(
    const std::vector<Tensor>& features,
    const Tensor& logits,
    const std::string& mode) {
  const Inputs inputs(features, logits, mode);
  const Pyramid& pyramid = inputs.pyramid;
  Tensor out = empty_maps_of(
      inputs.logits,
      {inputs.samples(), pyramid.channels, pyramid.height, pyramid.width},
      inputs.format);
  const Tensor weights = inputs.weights();
  const float* weights_data = weights.const_data_ptr<float>();
  void* out_data = out.mutable_data_ptr();
  const auto& kernels = asff_kernels();
  if (pyramid.channels_last) {
    parallel_for(
        inputs.rows(), inputs.row_size(), [&](int64_t begin, int64_t end) {
          kernels.fuse_channels_last(
              pyramid, weights_data, out_data, begin, end);
        });
  } else {
    parallel_for(
        inputs.samples() * pyramid.channels,
        inputs.plane_size(),
        [&](int64_t begin, int64_t end) {
          const auto scratch = make_scratch(pyramid);
          kernels.fuse_contiguous(
              pyramid, weights_data, out_data, scratch.get(), begin, end);
        });
  }
  return out;
}

// Parts of a sample's channels, so that every thread has one.
int64_t parts_for(int64_t samples, int64_t channels) {
  const int64_t threads = torch::stable::get_num_threads();
  if (samples % threads == 0) {
    return 1;
  }
  const int64_t wanted = ceil_div(4 * threads, samples);
  const int64_t step = ceil_div(channels, std::min(wanted, channels));
  return ceil_div(channels, step);
}

std::tuple<std::vector<Tensor>, Tensor> asff_fuse_backward(
    const Tensor& grad_out_,
    const std::vector<Tensor>& features,
    const Tensor& logits,
    const std::string& mode) {
  Inputs inputs(features, logits, mode);
  Pyramid& pyramid = inputs.pyramid;
  STD_TORCH_CHECK(
      grad_out_.dim() == 4 && grad_out_.size(0) == inputs.samples() &&
          grad_out_.size(1) == pyramid.channels &&
          grad_out_.size(2) == pyramid.height &&
          grad_out_.size(3) == pyramid.width &&
          grad_out_.scalar_type() == logits.scalar_type(),
      "grad_out must have the shape and dtype of the result");
  const Tensor grad_out = in_format(grad_out_, inputs.format);
  std::vector<Tensor> grads;
  for (size_t l = 0; l < features.size(); ++l) {
    grads.push_back(empty_maps(inputs.features[l], inputs.format));
    pyramid.levels[l].grad = grads.back().mutable_data_ptr();
  }
  Tensor grad_logits = empty_maps(inputs.logits, inputs.logits_format);

  const int64_t samples = inputs.samples();
  const bool split = !pyramid.channels_last && samples * pyramid.channels > 0;
  const int64_t parts = split ? parts_for(samples, pyramid.channels) : 1;
  const Tensor weights = inputs.weights();
  Tensor dots = inputs.empty_weights(parts);
  const float* weights_data = weights.const_data_ptr<float>();
  const void* grad_data = grad_out.const_data_ptr();
  auto* dots_data = dots.mutable_data_ptr<float>();
  const auto& kernels = asff_kernels();
  if (pyramid.channels_last) {
    parallel_for(
        inputs.rows() / pyramid.coarsest,
        pyramid.coarsest * inputs.row_size(),
        [&](int64_t begin, int64_t end) {
          kernels.fuse_backward_channels_last(
              pyramid, weights_data, grad_data, dots_data, begin, end);
        });
  } else {
    parallel_for(
        samples * parts,
        pyramid.channels / parts * inputs.plane_size(),
        [&](int64_t begin, int64_t end) {
          const auto scratch = make_scratch(pyramid);
          kernels.fuse_backward_contiguous(
              pyramid,
              weights_data,
              grad_data,
              dots_data,
              parts,
              scratch.get(),
              begin,
              end);
        });
  }

  const Logits layout = inputs.logits_layout();
  void* grad_logits_data = grad_logits.mutable_data_ptr();
  parallel_for(
      inputs.rows(),
      parts * pyramid.num_levels * pyramid.width,
      [&](int64_t begin, int64_t end) {
        kernels.softmax_backward(
            layout,
            weights_data,
            dots_data,
            parts,
            grad_logits_data,
            begin,
            end);
      });
  return {grads, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("asff_fuse", TORCH_BOX(&asff_fuse));
  m.impl("asff_fuse_backward", TORCH_BOX(&asff_fuse_backward));
}

}  // namespace dlkernels
