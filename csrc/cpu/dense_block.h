#pragma once

// What the launchers of dense_block and of its transition share.

#include <cmath>
#include <vector>

#include "kernels/dense_block.h"
#include "scratch.h"

namespace dlkernels {

using Floats = std::vector<float>;

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
