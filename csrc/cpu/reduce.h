#pragma once

// Sums of many floats, in blocks, so that the rounding error grows with the
// number of blocks and not with the number of terms.

#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

// The sum of value(i, lanes) over the vectors of [0, size).
template <typename Value>
DLKERNELS_INLINE float sum_of(int64_t size, const Value& value) {
  constexpr int64_t kStep = 4 * kVecSize;
  constexpr int64_t kBlock = 32 * kStep;
  Vec total{};
  int64_t i = 0;
  while (i + kStep <= size) {
    const int64_t stop = i + kBlock < size ? i + kBlock : size;
    Vec a{}, b{}, c{}, d{};
    for (; i + kStep <= stop; i += kStep) {
      a += value(i, Full{});
      b += value(i + kVecSize, Full{});
      c += value(i + 2 * kVecSize, Full{});
      d += value(i + 3 * kVecSize, Full{});
    }
    total += (a + b) + (c + d);
  }
  for (; i + kVecSize <= size; i += kVecSize) {
    total += value(i, Full{});
  }
  if (i < size) {
    total += value(i, size - i);
  }
  return sum(total);
}

// sums[plane] = the sum of value(plane, i, lanes) over the vectors of [0,
// size). Small planes are summed four at a time, which shares the sums' last
// steps.
template <typename Value>
DLKERNELS_INLINE void sum_planes(
    int64_t planes, int64_t size, float* sums, const Value& value) {
  constexpr int64_t kSmall = 64 * kVecSize;
  int64_t plane = 0;
  for (; size <= kSmall && plane + 4 <= planes; plane += 4) {
    Vec total[4] = {};
    for (int64_t p = 0; p < 4; ++p) {
      for_each_vec(size, [&](int64_t i, auto lanes) {
        total[p] += value(plane + p, i, lanes);
      });
    }
    const Quad four = sums_of(total[0], total[1], total[2], total[3]);
    __builtin_memcpy(sums + plane, &four, sizeof(four));
  }
  for (; plane < planes; ++plane) {
    sums[plane] = sum_of(
        size, [&](int64_t i, auto lanes) { return value(plane, i, lanes); });
  }
}

struct VecPair {
  Vec first;
  Vec second;
};

struct Pair {
  double first;
  double second;
};

// The sums of both parts of value(i, lanes) over the vectors of [0, size).
template <typename Value>
DLKERNELS_INLINE Pair sum_pairs_of(int64_t size, const Value& value) {
  constexpr int64_t kBlock = 64 * kVecSize;
  VecPair total{};
  int64_t i = 0;
  while (i + kVecSize <= size) {
    const int64_t stop = i + kBlock < size ? i + kBlock : size;
    VecPair block{};
    for (; i + kVecSize <= stop; i += kVecSize) {
      const VecPair terms = value(i, Full{});
      block.first += terms.first;
      block.second += terms.second;
    }
    total.first += block.first;
    total.second += block.second;
  }
  if (i < size) {
    const VecPair terms = value(i, size - i);
    total.first += terms.first;
    total.second += terms.second;
  }
  return {sum(total.first), sum(total.second)};
}

// total[i] += value(i, lanes) for the vectors of [0, size).
template <typename Value>
DLKERNELS_INLINE void add_row(int64_t size, float* total, const Value& value) {
  constexpr int64_t kVecs = 4;
  int64_t i = 0;
  for (; i + kVecs * kVecSize <= size; i += kVecs * kVecSize) {
    Vec sums[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) {
      const int64_t at = i + v * kVecSize;
      sums[v] = load(total + at) + value(at, Full{});
    }
    for (int64_t v = 0; v < kVecs; ++v) {
      store(total + i + v * kVecSize, sums[v]);
    }
  }
  for (; i + kVecSize <= size; i += kVecSize) {
    store(total + i, load(total + i) + value(i, Full{}));
  }
  if (i < size) {
    const int64_t lanes = size - i;
    store(total + i, load(total + i, lanes) + value(i, lanes), lanes);
  }
}

// sums[column] = the sum over rows of value(row, column, lanes). Rows are read
// in order, one after another and a stretch of columns at a time, so that
// memory streams.
template <typename Value>
DLKERNELS_INLINE void sum_columns(
    int64_t rows, int64_t columns, float* sums, const Value& value) {
  constexpr int64_t kStretch = 2048;
  constexpr int64_t kBlock = 32;
  const auto clear = [](float* total, int64_t width) {
    for_each_vec(
        width, [&](int64_t c, auto lanes) { store(total + c, Vec{}, lanes); });
  };
  for (int64_t first = 0; first < columns; first += kStretch) {
    const int64_t rest = columns - first;
    const int64_t width = rest < kStretch ? rest : kStretch;
    float* total = sums + first;
    clear(total, width);
    float block[kStretch];
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
      clear(block, width);
      for (int64_t row = begin; row < end; ++row) {
        add_row(width, block, [&](int64_t c, auto lanes) {
          return value(row, first + c, lanes);
        });
      }
      add_row(width, total, [&](int64_t c, auto lanes) {
        return load(block + c, lanes);
      });
    }
  }
}

// first[column] and second[column] = the sums over rows of both parts of
// value(row, column, lanes); rows are few enough for one running sum.
template <typename Value>
DLKERNELS_INLINE void sum_pairs_of_columns(
    int64_t rows,
    int64_t columns,
    float* first,
    float* second,
    const Value& value) {
  for_each_vec(columns, [&](int64_t c, auto lanes) {
    store(first + c, Vec{}, lanes);
    store(second + c, Vec{}, lanes);
  });
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    for_each_vec(columns, [&](int64_t c, auto lanes) {
      const VecPair a = value(row, c, lanes);
      const VecPair b = value(row + 1, c, lanes);
      const Vec firsts = a.first + b.first;
      const Vec seconds = a.second + b.second;
      store(first + c, load(first + c, lanes) + firsts, lanes);
      store(second + c, load(second + c, lanes) + seconds, lanes);
    });
  }
  if (row < rows) {
    for_each_vec(columns, [&](int64_t c, auto lanes) {
      const VecPair terms = value(row, c, lanes);
      store(first + c, load(first + c, lanes) + terms.first, lanes);
      store(second + c, load(second + c, lanes) + terms.second, lanes);
    });
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
