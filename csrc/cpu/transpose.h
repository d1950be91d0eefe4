#pragma once

#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

// Swaps the off-diagonal halves of every square of 2 * kStep rows and lanes.
template <uint32_t kStep>
DLKERNELS_INLINE void swap_halves(Vec (&values)[kVecSize]) {
  UIntVec low{};
#pragma GCC unroll 16
  for (uint32_t lane = 0; lane < kVecSize; ++lane) {
    low[lane] = lane & kStep ? lane - kStep + kVecSize : lane;
  }
#pragma GCC unroll 16
  for (uint32_t i = 0; i < kVecSize; ++i) {
    if ((i & kStep) == 0) {
      const Vec a = values[i], b = values[i + kStep];
      values[i] = __builtin_shuffle(a, b, low);
      values[i + kStep] = __builtin_shuffle(a, b, low + kStep);
    }
  }
}

// values[i][j] becomes values[j][i].
DLKERNELS_INLINE void transpose(Vec (&values)[kVecSize]) {
  swap_halves<1>(values);
  swap_halves<2>(values);
  if constexpr (kVecSize > 4) {
    swap_halves<4>(values);
  }
  if constexpr (kVecSize > 8) {
    swap_halves<8>(values);
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
