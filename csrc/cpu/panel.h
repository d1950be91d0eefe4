#pragma once

// The product of a few rows and a panel of columns in registers, of which
// products of matrices consist.

#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

constexpr int kPanelVecs = 2;
constexpr int64_t kPanel = kPanelVecs * kVecSize;

DLKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

DLKERNELS_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

DLKERNELS_INLINE int64_t rounded_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// to[row, column] (+)= sum over k of a[row * row_step + k * k_step] *
// b[k * b_step + column]. The sum over k is complete before it is added, so
// that long sums are summed in blocks.
template <int kCount, int kVecs>
DLKERNELS_INLINE void multiply_panel(
    int64_t depth,
    const float* a,
    int64_t row_step,
    int64_t k_step,
    const float* b,
    int64_t b_step,
    float* to,
    int64_t to_pitch,
    bool accumulate) {
  Vec total[kCount][kVecs];
#pragma GCC unroll 16
  for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      total[row][v] = Vec{};
    }
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      columns[v] = load(b + v * kVecSize);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      const Vec value = broadcast(a[row * row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        total[row][v] += value * columns[v];
      }
    }
    a += k_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* at = to + row * to_pitch + v * kVecSize;
      store(at, accumulate ? load(at) + total[row][v] : total[row][v]);
    }
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
