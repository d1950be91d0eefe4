#pragma once

// What launchers of kernels with a depthwise convolution inside share.

#include <memory>
#include <vector>

#include "../include/tensor.h"
#include "kernels/mbconv.h"

namespace dlkernels {

// The weight is that of the convolution of `channels` maps as large as those of
// x; padding is that of the left, the right, the top and the bottom.
inline DepthwiseShape depthwise_shape(
    const Tensor& x,
    int64_t channels,
    const Tensor& weight,
    int64_t stride,
    const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 &&
          weight.size(2) == weight.size(3) &&
          weight.scalar_type() == torch::headeronly::ScalarType::Float,
      "weight must be float32 of shape [C, 1, K, K]");
  const int64_t kernel = weight.size(2);
  STD_TORCH_CHECK(
      (kernel == 3 || kernel == 5 || kernel == 7) &&
          (stride == 1 || stride == 2) && padding.size() == 4,
      "the kernel must be 3, 5 or 7, the stride 1 or 2, the padding four "
      "numbers");
  for (const int64_t pad : padding) {
    STD_TORCH_CHECK(
        0 <= pad && pad < kernel, "the padding must be less than the kernel");
  }
  const int64_t height = x.size(2) + padding[2] + padding[3];
  const int64_t width = x.size(3) + padding[0] + padding[1];
  STD_TORCH_CHECK(
      x.size(2) > 0 && x.size(3) > 0 && height >= kernel && width >= kernel,
      "the kernel must not be larger than the padded maps");
  return {
      scalar_type_of(x, "x"),
      x.size(0),
      channels,
      x.size(2),
      x.size(3),
      (height - kernel) / stride + 1,
      (width - kernel) / stride + 1,
      kernel,
      stride,
      padding[2],
      padding[0]};
}

inline Tensor empty_outputs(
    const Tensor& x,
    const DepthwiseShape& shape,
    int64_t channels,
    MemoryFormat format) {
  const std::array<int64_t, 4> sizes{
      shape.samples, channels, shape.out_height, shape.out_width};
  return torch::stable::empty(
      sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
}

// Memory of a thread's own, from a cache line on, not initialized.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t floats) : memory_(new float[floats + kLine]) {}

  float* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    const auto past = static_cast<int64_t>(address / sizeof(float) % kLine);
    return memory_.get() + (kLine - past) % kLine;
  }

 private:
  static constexpr int64_t kLine = 16;

  std::unique_ptr<float[]> memory_;
};

inline int64_t groups_of(const DepthwiseShape& shape) {
  return ceil_div(shape.channels, kGroup);
}

// The weight, times a factor for each channel unless that is null, as kernels
// read it that work on groups of channels.
inline std::vector<float> grouped(
    const DepthwiseShape& shape, const float* weight, const float* factor) {
  const int64_t taps = shape.kernel * shape.kernel;
  std::vector<float> result(groups_of(shape) * taps * kGroup);
  for (int64_t c = 0; c < shape.channels; ++c) {
    float* group = result.data() + c / kGroup * taps * kGroup + c % kGroup;
    for (int64_t k = 0; k < taps; ++k) {
      group[k * kGroup] =
          weight[c * taps + k] * (factor == nullptr ? 1.0f : factor[c]);
    }
  }
  return result;
}

}  // namespace dlkernels
