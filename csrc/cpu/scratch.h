#pragma once

// What launchers of kernels that work tile by tile share.

#include "../include/tensor.h"
#include "tiling.h"

namespace dlkernels {

inline Slice slice_of(const Tensor& maps, int64_t first, int64_t count) {
  return {
      const_cast<void*>(maps.const_data_ptr()),
      scalar_type_of(maps, "x"),
      memory_format_of(maps) == MemoryFormat::ChannelsLast,
      maps.size(1),
      first,
      count};
}

// Splits [0, items) into one stretch per thread and calls
// body(thread, begin, end) for each.
template <typename Body>
void for_each_thread(int64_t items, const Body& body) {
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), items);
  if (threads == 1) {
    body(0, 0, items);
  } else if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        body(thread, thread * items / threads, (thread + 1) * items / threads);
      }
    });
  }
}

// Memory that each thread has a part of.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t floats_per_thread)
      : size_(floats_per_thread),
        memory_(empty_float(
            like, {torch::stable::get_num_threads() * floats_per_thread})) {}

  float* of(int64_t thread) const {
    return memory_.mutable_data_ptr<float>() + thread * size_;
  }

 private:
  int64_t size_;
  Tensor memory_;
};

inline Grid grid_of(const Tensor& maps) {
  STD_TORCH_CHECK(maps.dim() == 4, "maps must have shape [N, C, H, W]");
  return {maps.size(0), maps.size(2), maps.size(3)};
}

}  // namespace dlkernels
