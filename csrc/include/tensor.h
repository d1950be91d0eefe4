#pragma once

// What launchers need of a tensor, on PyTorch's stable ABI.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "scalar_types.h"

namespace dlkernels {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

inline ScalarType scalar_type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return ScalarType::Float;
    case torch::headeronly::ScalarType::BFloat16:
      return ScalarType::BFloat16;
    case torch::headeronly::ScalarType::Half:
      return ScalarType::Half;
    default:
      STD_TORCH_CHECK(
          false, name, " must be float32, bfloat16 or float16 in this kernel");
  }
  return ScalarType::Float;
}

inline bool is_channels_last(const Tensor& maps) {
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (maps.size(dim) != 1) {
      if (maps.stride(dim) != expected) {
        return false;
      }
      expected *= maps.size(dim);
    }
  }
  return true;
}

// The memory format that results shaped like `maps` [N, C, H, W] have:
// channels_last where `maps` is that and nothing else, contiguous otherwise.
inline MemoryFormat memory_format_of(const Tensor& maps) {
  return !maps.is_contiguous() && is_channels_last(maps)
             ? MemoryFormat::ChannelsLast
             : MemoryFormat::Contiguous;
}

// `maps` itself where it has that format already.
inline Tensor in_format(const Tensor& maps, MemoryFormat format) {
  const bool has_format = format == MemoryFormat::ChannelsLast
                              ? is_channels_last(maps)
                              : maps.is_contiguous();
  return has_format ? maps : torch::stable::contiguous(maps, format);
}

inline std::optional<Tensor> in_format(
    const std::optional<Tensor>& maps, MemoryFormat format) {
  return maps ? std::optional<Tensor>(in_format(*maps, format)) : std::nullopt;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return in_format(tensor, MemoryFormat::Contiguous);
}

inline std::optional<Tensor> as_contiguous(
    const std::optional<Tensor>& tensor) {
  return in_format(tensor, MemoryFormat::Contiguous);
}

inline Tensor empty_maps(const Tensor& maps, MemoryFormat format) {
  return torch::stable::empty(
      maps.sizes(),
      maps.scalar_type(),
      std::nullopt,
      maps.device(),
      std::nullopt,
      format);
}

inline Tensor empty_float(
    const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(
      like, sizes, torch::headeronly::ScalarType::Float);
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline int64_t ceil_div(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// Runs body(begin, end) over [0, items) on PyTorch's threads, in one thread
// where the whole costs less than starting others.
template <typename Body>
void parallel_for(int64_t items, int64_t cost_per_item, const Body& body) {
  constexpr int64_t kMinCostPerThread = 16384;
  const int64_t grain =
      ceil_div(kMinCostPerThread, std::max<int64_t>(1, cost_per_item));
  if (items > 0) {
    torch::stable::parallel_for(0, items, grain, body);
  }
}

}  // namespace dlkernels
