#pragma once

// What the launchers of dense_block and of its transition share.

#include <cmath>
#include <vector>

#include "../include/tensor.h"
#include "kernels/dense_block.h"

namespace dlkernels {

using Floats = std::vector<float>;

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

// Of a norm, or statistics.
inline void check_per_channel(const Tensor& values, int64_t channels) {
  STD_TORCH_CHECK(
      values.numel() == channels && values.is_contiguous() &&
          values.scalar_type() == torch::headeronly::ScalarType::Float,
      "norms and statistics must be contiguous float32 tensors of one value "
      "per channel");
}

// Mean and biased variance of each channel from the moments of its tiles.
inline void merge_moments(
    const Tiling& tiling,
    const float* moments,
    int64_t channels,
    float* means,
    float* variances) {
  for (int64_t c = 0; c < channels; ++c) {
    double count = 0.0, mean = 0.0, squares = 0.0;
    for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
      const float* of_tile = moments + tile * 2 * channels + c;
      const double added = static_cast<double>(pixels_of(tiling, tile));
      const double difference = of_tile[0] - mean;
      mean += difference * added / (count + added);
      squares += of_tile[channels] +
                 difference * difference * count * added / (count + added);
      count += added;
    }
    means[c] = static_cast<float>(mean);
    variances[c] = static_cast<float>(squares / std::max(1.0, count));
  }
}

// Mean and biased variance of a slice.
inline void take_moments(
    const Slice& in,
    const Grid& grid,
    const Tensor& like,
    float* mean,
    float* variance) {
  const Tiling tiling = tiling_of(grid, 1);
  const Scratch scratch(like, scratch_size(tiling, 1));
  Floats moments(2 * in.count * tiling.tiles);
  const MomentsArgs args{tiling, in, moments.data()};
  for_each_thread(
      tiling.tiles, [&](int64_t thread, int64_t begin, int64_t end) {
        dense_block_kernels().moments(args, scratch.of(thread), begin, end);
      });
  merge_moments(tiling, moments.data(), in.count, mean, variance);
}

// One batch norm with the statistics that it normalises with.
class Norm {
 public:
  Norm(
      const float* mean,
      const float* variance,
      const Tensor& weight,
      const Tensor& bias,
      double eps)
      : mean_(mean),
        shift_(bias.const_data_ptr<float>()),
        inverse_deviation_(weight.numel()),
        scale_(weight.numel()) {
    const float* factor = weight.const_data_ptr<float>();
    for (size_t c = 0; c < scale_.size(); ++c) {
      inverse_deviation_[c] =
          static_cast<float>(1.0 / std::sqrt(variance[c] + eps));
      scale_[c] = factor[c] * inverse_deviation_[c];
    }
  }

  Affine affine() const {
    return {mean_, scale_.data(), shift_};
  }
  float scale(int64_t channel) const {
    return scale_[channel];
  }
  float inverse_deviation(int64_t channel) const {
    return inverse_deviation_[channel];
  }

 private:
  const float* mean_;
  const float* shift_;
  Floats inverse_deviation_;
  Floats scale_;
};

}  // namespace dlkernels
