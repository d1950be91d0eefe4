#pragma once

// Depthwise convolution of one zero-padded plane of floats, its gradients
// likewise. A plane lies in scratch memory in one of two forms:
//
// * Rows, for contiguous maps: vectors run along a row. Under stride 2 a row
//   holds its even columns first and its odd ones from `half` on, so that the
//   inputs of neighbouring outputs are neighbours.
// * Pixels, for channels_last maps: each pixel is kGroup channels.
//
// What depends on the kernel's size and stride is compiled for each of them,
// and apart from what depends on dtypes and activations: planes of floats come
// in and go out.
//
// The gradient of the input is, for each residue of row and column modulo the
// stride, a convolution of stride 1 of the outputs' gradient with the taps of
// that residue, turned around.

#include "kernels/mbconv.h"
#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A vector may be read from any column of a row, so rows end in some zeros.
constexpr int64_t kSlack = 16;

// Rows of a plane.
struct Rows {
  float* data;
  int64_t stride;  // from row to row
  int64_t half;    // from a row's even columns to its odd ones, under stride 2

  template <int S>
  DLKERNELS_MEMBER int64_t column(int64_t index) const {
    return S == 1 ? index : index % 2 * half + index / 2;
  }
};

// How many taps of a kernel of size K have that residue modulo the stride S.
constexpr int taps(int K, int S, int residue) {
  return (K - residue + S - 1) / S;
}

DLKERNELS_INLINE int64_t area_of(const DepthwiseShape& shape) {
  return shape.height * shape.width;
}

DLKERNELS_INLINE int64_t out_area_of(const DepthwiseShape& shape) {
  return shape.out_height * shape.out_width;
}

DLKERNELS_INLINE int64_t rows_read(const DepthwiseShape& shape) {
  return (shape.out_height - 1) * shape.stride + shape.kernel;
}

DLKERNELS_INLINE int64_t columns_read(const DepthwiseShape& shape) {
  return (shape.out_width - 1) * shape.stride + shape.kernel;
}

// Rows of inputs that neighbouring rows of outputs share.
DLKERNELS_INLINE int64_t shared_rows(const DepthwiseShape& shape) {
  return shape.kernel - shape.stride;
}

// Rows of a map.
struct Band {
  int64_t first;
  int64_t rows;

  DLKERNELS_MEMBER int64_t end() const {
    return first + rows;
  }
};

// Hands out scratch memory; from a null pointer it only counts.
class Scratch {
 public:
  DLKERNELS_MEMBER explicit Scratch(float* memory) : memory_(memory) {}

  DLKERNELS_MEMBER float* take(int64_t floats) {
    float* taken = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += round_up(floats, kSlack);
    return taken;
  }

  DLKERNELS_MEMBER int64_t taken() const {
    return taken_;
  }

 private:
  float* memory_;
  int64_t taken_ = 0;
};

template <int kValue>
struct Known {
  static constexpr int value = kValue;
};

// body(Known<kernel>, Known<stride>).
template <typename Body>
DLKERNELS_INLINE auto with_sizes(
    const DepthwiseShape& shape, const Body& body) {
  const auto with_stride = [&](auto kernel) {
    return shape.stride == 2 ? body(kernel, Known<2>{})
                             : body(kernel, Known<1>{});
  };
  switch (shape.kernel) {
    case 3:
      return with_stride(Known<3>{});
    case 5:
      return with_stride(Known<5>{});
    default:
      return with_stride(Known<7>{});
  }
}

// The part of [0, extent) + padding that has the residue modulo the stride:
// indices begin to begin + count of which each stands for S * index + residue.
struct Phase {
  int64_t begin;
  int64_t count;
};

template <int S>
DLKERNELS_INLINE Phase phase_of(int64_t extent, int64_t pad, int64_t residue) {
  const int64_t begin = (pad - residue + S - 1) / S;
  const int64_t last = (extent - 1 + pad - residue + S) / S - 1;
  return {begin, last - begin + 1};
}

// ---- rows ---------------------------------------------------------------

// emit(y, x, sums, lanes) for R rows of outputs from y on.
template <int KH, int KW, int S, int R, typename Emit>
DLKERNELS_INLINE void convolve_some_rows(
    const Rows& in,
    const float* weight,
    int64_t y,
    int64_t width,
    const Emit& emit) {
  for_each_vec(width, [&](int64_t x, auto lanes) {
    Vec total[R] = {};
#pragma GCC unroll 16
    for (int row = 0; row < (R - 1) * S + KH; ++row) {
      const float* values = in.data + (y * S + row) * in.stride + x;
#pragma GCC unroll 8
      for (int kx = 0; kx < KW; ++kx) {
        const Vec value = load(values + in.template column<S>(kx));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int ky = row - r * S;
          if (ky >= 0 && ky < KH) {
            total[r] += weight[ky * KW + kx] * value;
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      emit(y + r, x, total[r], lanes);
    }
  });
}

// Outputs [height, width]; some rows may be emitted twice.
template <int KH, int KW, int S, typename Emit>
DLKERNELS_INLINE void convolve_rows(
    const Rows& in,
    const float* weight,
    int64_t height,
    int64_t width,
    const Emit& emit) {
  constexpr int kRows = 4;
  if (height < kRows) {
    for (int64_t y = 0; y < height; ++y) {
      convolve_some_rows<KH, KW, S, 1>(in, weight, y, width, emit);
    }
    return;
  }
  for (int64_t y = 0; y < height; y += kRows) {
    const int64_t first = y + kRows <= height ? y : height - kRows;
    convolve_some_rows<KH, KW, S, kRows>(in, weight, first, width, emit);
  }
}

// The outputs [height, width] of a padded plane, row after row.
template <int K, int S>
DLKERNELS_NOINLINE void convolve_plane(
    const Rows& in,
    const float* weight,
    int64_t height,
    int64_t width,
    float* out) {
  convolve_rows<K, K, S>(
      in,
      weight,
      height,
      width,
      [&](int64_t y, int64_t x, Vec value, auto lanes) {
        store(out + y * width + x, value, lanes);
      });
}

// sums[ky * K + kx] += the sum of grad * in for M taps ky, from the residue on
// in steps of S, and KX taps kx.
template <int K, int S, int M, int KX>
DLKERNELS_INLINE void weight_gradient_of_taps(
    const Rows& in,
    const Rows& grad,
    int64_t residue,
    int kx,
    int64_t height,
    int64_t width,
    double* sums) {
  Vec total[M][KX] = {};
  int64_t columns[KX];
  for (int k = 0; k < KX; ++k) {
    columns[k] = in.template column<S>(kx + k);
  }
  // Row j of the residue meets the outputs' rows j, j - 1, ..., j - M + 1;
  // above and below the outputs their gradient is padded with zeros.
  for (int64_t j = 0; j < height + M - 1; ++j) {
    const float* values = in.data + (j * S + residue) * in.stride;
    const float* grads = grad.data + j * grad.stride;
    for (int64_t x = 0; x < width; x += kVecSize) {
      Vec at[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        at[m] = load(grads - m * grad.stride + x);
      }
#pragma GCC unroll 8
      for (int k = 0; k < KX; ++k) {
        const Vec value = load(values + columns[k] + x);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          total[m][k] += at[m] * value;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int k = 0; k < KX; ++k) {
      sums[(m * S + residue) * K + kx + k] += sum(total[m][k]);
    }
  }
}

// As many taps at a time as there are registers for.
template <int K, int S, int M>
DLKERNELS_INLINE void weight_gradient_of_residue(
    const Rows& in,
    const Rows& grad,
    int64_t residue,
    int64_t height,
    int64_t width,
    double* sums) {
  constexpr int kRegisters = kVecSize == 16 ? 32 : 16;
  constexpr int kFitting = (kRegisters - 1 - M) / M;
  constexpr int kTaps = kFitting < 1 ? 1 : kFitting < K ? kFitting : K;
  int kx = 0;
  for (; kx + kTaps <= K; kx += kTaps) {
    weight_gradient_of_taps<K, S, M, kTaps>(
        in, grad, residue, kx, height, width, sums);
  }
  if constexpr (K % kTaps != 0) {
    weight_gradient_of_taps<K, S, M, K % kTaps>(
        in, grad, residue, kx, height, width, sums);
  }
}

// Adds the gradient of the K * K weights to sums. grad points to the first
// output, around which its plane is zero.
template <int K, int S>
DLKERNELS_NOINLINE void weight_gradient_of_rows(
    const Rows& in,
    const Rows& grad,
    int64_t height,
    int64_t width,
    double* sums) {
  weight_gradient_of_residue<K, S, taps(K, S, 0)>(
      in, grad, 0, height, width, sums);
  if constexpr (S == 2) {
    weight_gradient_of_residue<K, S, taps(K, S, 1)>(
        in, grad, 1, height, width, sums);
  }
}

// The taps of residues P and Q, turned around; `lanes` floats each.
template <int K, int S, int P, int Q>
DLKERNELS_INLINE void turned_taps(
    const float* weight, int64_t lanes, float* turned) {
  constexpr int kHigh = taps(K, S, P);
  constexpr int kWide = taps(K, S, Q);
  for (int m = 0; m < kHigh; ++m) {
    for (int l = 0; l < kWide; ++l) {
      const int ky = P + S * (kHigh - 1 - m);
      const int kx = Q + S * (kWide - 1 - l);
      for (int64_t i = 0; i < lanes; ++i) {
        turned[(m * kWide + l) * lanes + i] = weight[(ky * K + kx) * lanes + i];
      }
    }
  }
}

// Calls emit(row, column, gradient, lanes) for the input's pixels at
// (S * row + P', S * column + Q'), both residues counted without padding.
template <int K, int S, int P, int Q, typename Emit>
DLKERNELS_INLINE void input_gradient_of_residues(
    const DepthwiseShape& shape,
    const Rows& grad,
    const float* weight,
    const Emit& emit) {
  constexpr int kHigh = taps(K, S, P);
  constexpr int kWide = taps(K, S, Q);
  float turned[kHigh * kWide];
  turned_taps<K, S, P, Q>(weight, 1, turned);
  const Phase rows = phase_of<S>(shape.height, shape.pad_top, P);
  const Phase columns = phase_of<S>(shape.width, shape.pad_left, Q);
  const Rows from{
      grad.data + (rows.begin - kHigh + 1) * grad.stride + columns.begin -
          kWide + 1,
      grad.stride,
      0};
  const int64_t top = S * rows.begin + P - shape.pad_top;
  const int64_t left = S * columns.begin + Q - shape.pad_left;
  convolve_rows<kHigh, kWide, 1>(
      from,
      turned,
      rows.count,
      columns.count,
      [&](int64_t y, int64_t x, Vec value, auto lanes) {
        emit(S * y + top, left, x, value, lanes);
      });
}

// ---- stride 2: even and odd columns -------------------------------------

struct Halves {
  Vec first;
  Vec second;
};

// Lanes 0, 2, 4, ... and 1, 3, 5, ... of both vectors.
DLKERNELS_INLINE Halves deinterleave(Vec a, Vec b) {
#if defined(__AVX512F__)
  return {
      __builtin_shufflevector(
          a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
      __builtin_shufflevector(
          a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#elif defined(__AVX2__)
  return {
      __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14),
      __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)};
#else
  return {
      __builtin_shufflevector(a, b, 0, 2, 4, 6),
      __builtin_shufflevector(a, b, 1, 3, 5, 7)};
#endif
}

// The inverse.
DLKERNELS_INLINE Halves interleave(Vec a, Vec b) {
#if defined(__AVX512F__)
  return {
      __builtin_shufflevector(
          a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
      __builtin_shufflevector(
          a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#elif defined(__AVX2__)
  return {
      __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
      __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
#else
  return {
      __builtin_shufflevector(a, b, 0, 4, 1, 5),
      __builtin_shufflevector(a, b, 2, 6, 3, 7)};
#endif
}

// The gradient [height, width] of the input, row after row. Under stride 2 its
// even and odd columns are computed apart, in `residues`.
template <int K, int S>
DLKERNELS_NOINLINE void input_gradient_of_rows(
    const DepthwiseShape& shape,
    const Rows& grad,
    const Rows& residues,
    const float* weight,
    float* out) {
  if constexpr (S == 1) {
    input_gradient_of_residues<K, 1, 0, 0>(
        shape,
        grad,
        weight,
        [&](int64_t y, int64_t left, int64_t x, Vec value, auto lanes) {
          store(out + y * shape.width + left + x, value, lanes);
        });
  } else {
    const auto emit =
        [&](int64_t y, int64_t left, int64_t x, Vec value, auto lanes) {
          float* row = residues.data + y * residues.stride;
          store(row + left % 2 * residues.half + x, value, lanes);
        };
    input_gradient_of_residues<K, 2, 0, 0>(shape, grad, weight, emit);
    input_gradient_of_residues<K, 2, 0, 1>(shape, grad, weight, emit);
    input_gradient_of_residues<K, 2, 1, 0>(shape, grad, weight, emit);
    input_gradient_of_residues<K, 2, 1, 1>(shape, grad, weight, emit);
    for (int64_t y = 0; y < shape.height; ++y) {
      const float* even = residues.data + y * residues.stride;
      const float* odd = even + residues.half;
      // A row may end in the next one, which is written after it.
      for (int64_t x = 0; x < shape.width; x += 2 * kVecSize) {
        const Halves columns =
            interleave(load(even + x / 2), load(odd + x / 2));
        store(out + y * shape.width + x, columns.first);
        store(out + y * shape.width + x + kVecSize, columns.second);
      }
    }
  }
}

// ---- pixels -------------------------------------------------------------

// Some rows of a plane, in a ring: row y takes the place of an earlier one.
// Pixels are of kGroup channels each, of which vectors are one part.
struct Pixels {
  float* data;
  int64_t stride;  // from row to row
  int64_t mask;    // the ring's rows, a power of two, less one

  DLKERNELS_MEMBER float* at(int64_t y, int64_t x) const {
    return data + (y & mask) * stride + x * kGroup;
  }
};

// A ring of padded rows of inputs: a power of two of them, at least what a row
// of outputs reads, else what fits into that many floats.
DLKERNELS_INLINE Pixels
take_ring(const DepthwiseShape& shape, int64_t floats, Scratch& scratch) {
  const int64_t stride = columns_read(shape) * kGroup;
  int64_t rows = 1;
  while (rows < shape.kernel || 2 * rows * stride <= floats) {
    rows *= 2;
  }
  return {scratch.take(rows * stride), stride, rows - 1};
}

// Rows of outputs that are worked on together: as many as a ring serves.
DLKERNELS_INLINE int64_t
band_of(const DepthwiseShape& shape, const Pixels& ring) {
  const int64_t rows = (ring.mask + 1 - shared_rows(shape)) / shape.stride;
  return rows < shape.out_height ? rows : shape.out_height;
}

DLKERNELS_INLINE void clear_pixels(float* row, int64_t width) {
  for (int64_t x = 0; x < width; ++x) {
    store(row + x * kGroup, Vec{});
  }
}

// Sums of X outputs from x on; rows point to the first pixels that the first
// output of their row reads.
template <int KH, int KW, int S, int X>
DLKERNELS_INLINE void convolve_some_pixels(
    const float* const (&rows)[KH],
    const float* weight,
    int64_t x,
    Vec* total) {
#pragma GCC unroll 8
  for (int ky = 0; ky < KH; ++ky) {
    const float* row = rows[ky] + x * S * kGroup;
    Vec tap[KW];
#pragma GCC unroll 8
    for (int kx = 0; kx < KW; ++kx) {
      tap[kx] = load(weight + (ky * KW + kx) * kGroup);
    }
#pragma GCC unroll 16
    for (int column = 0; column < (X - 1) * S + KW; ++column) {
      const Vec value = load(row + column * kGroup);
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) {
        const int kx = column - i * S;
        if (kx >= 0 && kx < KW) {
          total[i] += tap[kx] * value;
        }
      }
    }
  }
}

// A row of outputs, their pixels `step` apart; some may be computed twice.
template <int KH, int KW, int S>
DLKERNELS_INLINE void convolve_some_row(
    const float* const (&rows)[KH],
    const float* weight,
    int64_t width,
    float* out,
    int64_t step) {
  constexpr int kPixels = 7;
  if (width < kPixels) {
    for (int64_t x = 0; x < width; ++x) {
      Vec total{};
      convolve_some_pixels<KH, KW, S, 1>(rows, weight, x, &total);
      store(out + x * step * kGroup, total);
    }
    return;
  }
  for (int64_t x = 0; x < width; x += kPixels) {
    const int64_t first = x + kPixels <= width ? x : width - kPixels;
    Vec total[kPixels] = {};
    convolve_some_pixels<KH, KW, S, kPixels>(rows, weight, first, total);
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
      store(out + (first + i) * step * kGroup, total[i]);
    }
  }
}

// Row y of the outputs.
template <int K, int S>
DLKERNELS_NOINLINE void convolve_row_of_pixels(
    const Pixels& in,
    const float* weight,
    int64_t y,
    int64_t width,
    float* out) {
  const float* rows[K];
  for (int ky = 0; ky < K; ++ky) {
    rows[ky] = in.at(y * S + ky, 0);
  }
  convolve_some_row<K, K, S>(rows, weight, width, out, 1);
}

// Adds the gradient of M rows of taps, from ky on, to sums [K * K, kGroup].
template <int K, int S, int M>
DLKERNELS_INLINE void weight_gradient_of_some_taps(
    const Pixels& in,
    const Pixels& grad,
    int ky,
    int64_t begin,
    int64_t end,
    int64_t width,
    float* sums) {
  Vec total[M][K] = {};
  for (int64_t y = begin; y < end; ++y) {
    const float* grads = grad.at(y, 0);
    const float* rows[M];
    for (int m = 0; m < M; ++m) {
      rows[m] = in.at(y * S + ky + m, 0);
    }
    for (int64_t x = 0; x < width; ++x) {
      const Vec at = load(grads + x * kGroup);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* row = rows[m] + x * S * kGroup;
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          total[m][kx] += at * load(row + kx * kGroup);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      float* tap = sums + ((ky + m) * K + kx) * kGroup;
      store(tap, load(tap) + total[m][kx]);
    }
  }
}

// Adds the gradient of the K * K weights from the outputs' rows begin to end to
// sums [K * K, kGroup], as many rows of taps at a time as there are registers
// for: few sums would wait for each other.
template <int K, int S>
DLKERNELS_NOINLINE void weight_gradient_of_pixels(
    const Pixels& in,
    const Pixels& grad,
    int64_t begin,
    int64_t end,
    int64_t width,
    float* sums) {
  constexpr int kSums = kVecSize == 16 ? 28 : 12;
  constexpr int kTapRows = kSums / K < K ? kSums / K : K;
  int ky = 0;
  for (; ky + kTapRows <= K; ky += kTapRows) {
    weight_gradient_of_some_taps<K, S, kTapRows>(
        in, grad, ky, begin, end, width, sums);
  }
  if constexpr (K % kTapRows != 0) {
    weight_gradient_of_some_taps<K, S, K % kTapRows>(
        in, grad, ky, begin, end, width, sums);
  }
}

// The taps of all residues, turned around, one residue after the other.
template <int K, int S>
DLKERNELS_NOINLINE void turn_taps_of_pixels(
    const float* weight, float* turned) {
  turned_taps<K, S, 0, 0>(weight, kGroup, turned);
  if constexpr (S == 2) {
    constexpr int kEven = taps(K, 2, 0);
    constexpr int kOdd = taps(K, 2, 1);
    turned += kEven * kEven * kGroup;
    turned_taps<K, S, 0, 1>(weight, kGroup, turned);
    turned += kEven * kOdd * kGroup;
    turned_taps<K, S, 1, 0>(weight, kGroup, turned);
    turned += kOdd * kEven * kGroup;
    turned_taps<K, S, 1, 1>(weight, kGroup, turned);
  }
}

// Of the residues P and Q, from the outputs' row on.
template <int K, int S, int P, int Q>
DLKERNELS_INLINE void input_gradient_of_some_row(
    const DepthwiseShape& shape,
    const Pixels& grad,
    const float* turned,
    int64_t row,
    float* out) {
  constexpr int kHigh = taps(K, S, P);
  constexpr int kWide = taps(K, S, Q);
  const Phase columns = phase_of<S>(shape.width, shape.pad_left, Q);
  const float* rows[kHigh];
  for (int i = 0; i < kHigh; ++i) {
    rows[i] = grad.at(row - kHigh + 1 + i, columns.begin - kWide + 1);
  }
  const int64_t left = S * columns.begin + Q - shape.pad_left;
  convolve_some_row<kHigh, kWide, 1>(
      rows, turned, columns.count, out + left * kGroup, S);
}

// Row y of the input's gradient; `turned` is as turn_taps_of_pixels leaves it.
template <int K, int S>
DLKERNELS_NOINLINE void input_gradient_of_row(
    const DepthwiseShape& shape,
    const Pixels& grad,
    const float* turned,
    int64_t y,
    float* out) {
  const int64_t row = (y + shape.pad_top) / S;
  if constexpr (S == 1) {
    input_gradient_of_some_row<K, 1, 0, 0>(shape, grad, turned, row, out);
  } else {
    constexpr int kEven = taps(K, 2, 0);
    constexpr int kOdd = taps(K, 2, 1);
    if ((y + shape.pad_top) % 2 == 0) {
      input_gradient_of_some_row<K, 2, 0, 0>(shape, grad, turned, row, out);
      turned += kEven * kEven * kGroup;
      input_gradient_of_some_row<K, 2, 0, 1>(shape, grad, turned, row, out);
    } else {
      turned += kEven * K * kGroup;
      input_gradient_of_some_row<K, 2, 1, 0>(shape, grad, turned, row, out);
      turned += kOdd * kEven * kGroup;
      input_gradient_of_some_row<K, 2, 1, 1>(shape, grad, turned, row, out);
    }
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
