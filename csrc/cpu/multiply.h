#pragma once

// Products of small matrices, for the fully connected layers inside kernels.

#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};

// out(row, column, value, lanes) for each vector of
// value[row, column] = sum over d of a(row, d) * b(d, column, lanes).
template <
    int64_t kRows,
    int64_t kVecs,
    typename Lanes,
    typename A,
    typename B,
    typename Out>
DLKERNELS_INLINE void multiply_tile(
    int64_t row,
    int64_t column,
    int64_t depth,
    Lanes lanes,
    const A& a,
    const B& b,
    const Out& out) {
  Vec total[kRows][kVecs] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec right[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) {
      right[v] = b(d, column + v * kVecSize, lanes);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const float left = a(row + r, d);
      for (int64_t v = 0; v < kVecs; ++v) {
        total[r][v] += left * right[v];
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVecs; ++v) {
      out(row + r, column + v * kVecSize, total[r][v], lanes);
    }
  }
}

// The product of a [rows, depth] and b [depth, columns], given and taken as by
// multiply_tile.
template <typename A, typename B, typename Out>
DLKERNELS_INLINE void multiply(
    int64_t rows,
    int64_t columns,
    int64_t depth,
    const A& a,
    const B& b,
    const Out& out) {
  const auto strip = [&](auto height, int64_t row) {
    constexpr int64_t kRows = decltype(height)::value;
    int64_t column = 0;
    for (; column + 2 * kVecSize <= columns; column += 2 * kVecSize) {
      multiply_tile<kRows, 2>(row, column, depth, Full{}, a, b, out);
    }
    for (; column + kVecSize <= columns; column += kVecSize) {
      multiply_tile<kRows, 1>(row, column, depth, Full{}, a, b, out);
    }
    if (column < columns) {
      multiply_tile<kRows, 1>(row, column, depth, columns - column, a, b, out);
    }
  };
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    strip(Constant<4>{}, row);
  }
  for (; row < rows; ++row) {
    strip(Constant<1>{}, row);
  }
}

// The tile of multiply_transposed with kRows rows and kColumns columns.
template <int64_t kRows, int64_t kColumns, typename A, typename B, typename Out>
DLKERNELS_INLINE void multiply_transposed_tile(
    int64_t row,
    int64_t column,
    int64_t depth,
    const A& a,
    const B& b,
    const Out& out) {
  Vec total[kRows][kColumns] = {};
  for_each_vec(depth, [&](int64_t k, auto lanes) {
    Vec right[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) {
      right[c] = b(column + c, k, lanes);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec left = a(row + r, k, lanes);
      for (int64_t c = 0; c < kColumns; ++c) {
        total[r][c] += left * right[c];
      }
    }
  });
  for (int64_t r = 0; r < kRows; ++r) {
    const Vec* of = total[r];
    if constexpr (kColumns == 4) {
      const Quad sums = sums_of(of[0], of[1], of[2], of[3]);
      for (int64_t c = 0; c < 4; ++c) {
        out(row + r, column + c, sums[c]);
      }
    } else {
      for (int64_t c = 0; c < kColumns; ++c) {
        out(row + r, column + c, sum(of[c]));
      }
    }
  }
}

// out(row, column, value) for each
// value[row, column] = sum over k of a(row, k) * b(column, k), k < depth;
// a(row, k, lanes) and b(column, k, lanes) are vectors.
template <typename A, typename B, typename Out>
DLKERNELS_INLINE void multiply_transposed(
    int64_t rows,
    int64_t columns,
    int64_t depth,
    const A& a,
    const B& b,
    const Out& out) {
  const auto strip = [&](auto width, int64_t column) {
    constexpr int64_t kColumns = decltype(width)::value;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      multiply_transposed_tile<4, kColumns>(row, column, depth, a, b, out);
    }
    for (; row < rows; ++row) {
      multiply_transposed_tile<1, kColumns>(row, column, depth, a, b, out);
    }
  };
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    strip(Constant<4>{}, column);
  }
  for (; column < columns; ++column) {
    strip(Constant<1>{}, column);
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
