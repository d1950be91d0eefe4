#pragma once

// The vector of floats that CPU kernels compute with: as wide as the
// instruction set a kernel file is compiled for, on the compiler's own vector
// extension, so that + - * / and comparisons are plain operators and
// `mask ? a : b` selects lane by lane.
//
// 16-bit types are widened on load and rounded to nearest even on store.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../include/scalar_types.h"

#ifndef DLKERNELS_CPU_CAPABILITY
#error "a kernel file is compiled once per DLKERNELS_CPU_CAPABILITY"
#endif

#define DLKERNELS_INLINE static inline __attribute__((always_inline))
#define DLKERNELS_NOINLINE static __attribute__((noinline))
#define DLKERNELS_MEMBER inline __attribute__((always_inline))

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int64_t kVecSize = 16;
#elif defined(__AVX2__)
constexpr int64_t kVecSize = 8;
#else
constexpr int64_t kVecSize = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kVecSize)));
typedef int32_t IntVec __attribute__((vector_size(4 * kVecSize)));
typedef uint32_t UIntVec __attribute__((vector_size(4 * kVecSize)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kVecSize)));

DLKERNELS_INLINE Vec broadcast(float value) {
  return value - Vec{};
}

DLKERNELS_INLINE Vec as_float(UIntVec bits) {
  return reinterpret_cast<Vec>(bits);
}

DLKERNELS_INLINE UIntVec as_bits(Vec value) {
  return reinterpret_cast<UIntVec>(value);
}

// 0, 1, 2, ...
DLKERNELS_INLINE IntVec lane_indices() {
  IntVec indices;
  for (int32_t i = 0; i < kVecSize; ++i) {
    indices[i] = i;
  }
  return indices;
}

// ---- 16-bit conversions -------------------------------------------------

DLKERNELS_INLINE Vec widen(ShortVec value, BFloat16) {
  return as_float(__builtin_convertvector(value, UIntVec) << 16);
}

DLKERNELS_INLINE ShortVec narrow(Vec value, BFloat16) {
  const UIntVec bits = as_bits(value);
  const UIntVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const UIntVec quiet_nan = UIntVec{} + 0x7FC0;
  return __builtin_convertvector(
      value == value ? rounded : quiet_nan, ShortVec);
}

#if defined(__AVX512F__)
DLKERNELS_INLINE Vec widen(ShortVec value, Half) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_cvtph_ps(0xFFFF, reinterpret_cast<__m256i>(value)));
}

DLKERNELS_INLINE ShortVec narrow(Vec value, Half) {
  return reinterpret_cast<ShortVec>(_mm512_maskz_cvtps_ph(
      0xFFFF, reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
DLKERNELS_INLINE Vec widen(ShortVec value, Half) {
  return reinterpret_cast<Vec>(
      _mm256_cvtph_ps(reinterpret_cast<__m128i>(value)));
}

DLKERNELS_INLINE ShortVec narrow(Vec value, Half) {
  return reinterpret_cast<ShortVec>(_mm256_cvtps_ph(
      reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Half precision in integer arithmetic. Multiplying by a power of two aligns
// the exponents and lets the hardware normalise subnormal numbers.
DLKERNELS_INLINE Vec widen(ShortVec value, Half) {
  const UIntVec half = __builtin_convertvector(value, UIntVec);
  const UIntVec magnitude = (half & 0x7FFF) << 13;
  const Vec finite = as_float(magnitude) * 0x1p112f;
  const UIntVec special = magnitude | 0x7F800000;
  const UIntVec bits = (half & 0x7C00) == 0x7C00 ? special : as_bits(finite);
  return as_float(bits | ((half & 0x8000) << 16));
}

DLKERNELS_INLINE ShortVec narrow(Vec value, Half) {
  const UIntVec bits = as_bits(value);
  const UIntVec sign = (bits >> 16) & 0x8000;
  const UIntVec magnitude = bits & 0x7FFFFFFF;
  // Normal: rebias the exponent, round the 13 lost bits to nearest even.
  const UIntVec normal =
      (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: adding 0.5 shifts the mantissa into place and rounds it.
  const UIntVec subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000;
  const UIntVec infinity = UIntVec{} + 0x7C00;
  const UIntVec quiet_nan = UIntVec{} + 0x7E00;
  UIntVec half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477FF000 ? infinity : half;
  half = magnitude > 0x7F800000 ? quiet_nan : half;
  return __builtin_convertvector(half | sign, ShortVec);
}
#endif

// ---- memory -------------------------------------------------------------

DLKERNELS_INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
DLKERNELS_INLINE Vec load(const T* from) {
  ShortVec value;
  __builtin_memcpy(&value, from, sizeof(value));
  return widen(value, T{});
}

DLKERNELS_INLINE void store(float* to, Vec value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T>
DLKERNELS_INLINE void store(T* to, Vec value) {
  const ShortVec narrowed = narrow(value, T{});
  __builtin_memcpy(to, &narrowed, sizeof(narrowed));
}

// The first `count` lanes (0 <= count < kVecSize); the others are zero.
DLKERNELS_INLINE Vec load(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
#elif defined(__AVX2__)
  const IntVec mask = lane_indices() < static_cast<int32_t>(count);
  return reinterpret_cast<Vec>(
      _mm256_maskload_ps(from, reinterpret_cast<__m256i>(mask)));
#else
  Vec value{};
  for (int64_t i = 0; i < count; ++i) {
    value[i] = from[i];
  }
  return value;
#endif
}

template <typename T>
DLKERNELS_INLINE Vec load(const T* from, int64_t count) {
#if defined(__AVX512F__)
  return widen(
      reinterpret_cast<ShortVec>(_mm256_maskz_loadu_epi16(
          static_cast<__mmask16>((1u << count) - 1), from)),
      T{});
#else
  ShortVec value{};
  for (int64_t i = 0; i < count; ++i) {
    value[i] = from[i].bits;
  }
  return widen(value, T{});
#endif
}

DLKERNELS_INLINE void store(float* to, Vec value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(
      to,
      static_cast<__mmask16>((1u << count) - 1),
      reinterpret_cast<__m512>(value));
#elif defined(__AVX2__)
  // Not a masked store, which is slow on some processors.
  const __m256 all = reinterpret_cast<__m256>(value);
  __m128 rest = _mm256_castps256_ps128(all);
  if (count & 4) {
    _mm_storeu_ps(to, rest);
    rest = _mm256_extractf128_ps(all, 1);
    to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    rest = _mm_movehl_ps(rest, rest);
    to += 2;
  }
  if (count & 1) {
    _mm_store_ss(to, rest);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    to[i] = value[i];
  }
#endif
}

template <typename T>
DLKERNELS_INLINE void store(T* to, Vec value, int64_t count) {
  const ShortVec narrowed = narrow(value, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(
      to,
      static_cast<__mmask16>((1u << count) - 1),
      reinterpret_cast<__m256i>(narrowed));
#else
  for (int64_t i = 0; i < count; ++i) {
    to[i].bits = narrowed[i];
  }
#endif
}

// Tag for loops whose body reads and writes whole vectors: the tail of a loop
// gets a lane count instead, and the same body serves both.
struct Full {};

template <typename T>
DLKERNELS_INLINE Vec load(const T* from, Full) {
  return load(from);
}

template <typename T>
DLKERNELS_INLINE void store(T* to, Vec value, Full) {
  store(to, value);
}

// The lanes that a loop's tail has; the others become zero.
DLKERNELS_INLINE Vec keep(Vec value, Full) {
  return value;
}

DLKERNELS_INLINE Vec keep(Vec value, int64_t count) {
  return lane_indices() < static_cast<int32_t>(count) ? value : Vec{};
}

// Calls body(i, lanes) for each vector of [0, size): lanes is Full{} but for
// the last, incomplete vector, where it is the number of lanes.
template <typename Body>
DLKERNELS_INLINE void for_each_vec(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kVecSize <= size; i += kVecSize) {
    body(i, Full{});
  }
  if (i < size) {
    body(i, size - i);
  }
}

// Tag for whole vectors that are stored past the caches, at aligned addresses:
// right for results too large to be found in cache by whoever reads them next.
struct Streamed {};

template <typename T>
DLKERNELS_INLINE Vec load(const T* from, Streamed) {
  return load(from);
}

DLKERNELS_INLINE void store(float* to, Vec value, Streamed) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
#else
  store(to, value);
#endif
}

template <typename T>
DLKERNELS_INLINE void store(T* to, Vec value, Streamed) {
  const ShortVec narrowed = narrow(value, T{});
#if defined(__AVX512F__)
  _mm256_stream_si256(
      reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(narrowed));
#elif defined(__AVX2__)
  _mm_stream_si128(
      reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(narrowed));
#else
  __builtin_memcpy(to, &narrowed, sizeof(narrowed));
#endif
}

// Before other threads may read what was stored with Streamed.
DLKERNELS_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// As above for vectors that are stored to `to`: streamed ones start where `to`
// is aligned.
template <typename T, typename Body>
DLKERNELS_INLINE void for_each_vec(
    bool streamed, const T* to, int64_t size, const Body& body) {
  if (!streamed) {
    for_each_vec(size, body);
    return;
  }
  constexpr int64_t kBytes = kVecSize * sizeof(T);
  const int64_t past = reinterpret_cast<uintptr_t>(to) % kBytes / sizeof(T);
  int64_t i = past == 0 ? 0 : kVecSize - past;
  if (i > size) {
    i = size;
  }
  if (i > 0) {
    body(0, i);
  }
  for (; i + kVecSize <= size; i += kVecSize) {
    body(i, Streamed{});
  }
  if (i < size) {
    body(i, size - i);
  }
}

// A single element, widened or rounded as a vector of it would be.
template <typename T>
DLKERNELS_INLINE float load_one(const T* from) {
  return load(from, 1)[0];
}

template <typename T>
DLKERNELS_INLINE void store_one(T* to, float value) {
  store(to, broadcast(value), 1);
}

// ---- lanes --------------------------------------------------------------

// lanes[i] = value[indices[i]]
DLKERNELS_INLINE Vec permute(Vec value, IntVec indices) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_permutexvar_ps(
      reinterpret_cast<__m512i>(indices), reinterpret_cast<__m512>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_permutevar8x32_ps(
      reinterpret_cast<__m256>(value), reinterpret_cast<__m256i>(indices)));
#else
  Vec result{};
  for (int64_t i = 0; i < kVecSize; ++i) {
    result[i] = value[indices[i]];
  }
  return result;
#endif
}

// The sums of neighbouring lanes, those of `a` before those of `b`.
DLKERNELS_INLINE Vec pair_sums(Vec a, Vec b) {
#if defined(__AVX512F__)
#define DLKERNELS_EVEN_LANES \
  0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define DLKERNELS_ODD_LANES \
  1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define DLKERNELS_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define DLKERNELS_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define DLKERNELS_EVEN_LANES 0, 2, 4, 6
#define DLKERNELS_ODD_LANES 1, 3, 5, 7
#endif
  return __builtin_shufflevector(a, b, DLKERNELS_EVEN_LANES) +
         __builtin_shufflevector(a, b, DLKERNELS_ODD_LANES);
#undef DLKERNELS_EVEN_LANES
#undef DLKERNELS_ODD_LANES
}

// ---- arithmetic ---------------------------------------------------------

DLKERNELS_INLINE Vec sqrt(Vec value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(value)));
#else
  for (int64_t i = 0; i < kVecSize; ++i) {
    value[i] = __builtin_sqrtf(value[i]);
  }
  return value;
#endif
}

// Whether a comparison holds in any lane.
DLKERNELS_INLINE bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// NaN in either operand gives NaN, as in torch (the hardware's max does not).
DLKERNELS_INLINE Vec maximum(Vec a, Vec b) {
  return (a > b) | (a != a) ? a : b;
}

DLKERNELS_INLINE Vec minimum(Vec a, Vec b) {
  return (a < b) | (a != a) ? a : b;
}

DLKERNELS_INLINE float sum(Vec value) {
#if defined(__AVX512F__)
  const auto a =
      __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
      __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const Vec a = value;
#endif
#if defined(__AVX2__)
  const auto b = __builtin_shufflevector(a, a, 0, 1, 2, 3) +
                 __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
  const Vec b = a;
#endif
  const auto c = b + __builtin_shufflevector(b, b, 2, 3, 2, 3);
  return c[0] + c[1];
}

typedef float Quad __attribute__((vector_size(16)));

// The sums of four vectors.
DLKERNELS_INLINE Quad sums_of(Vec a, Vec b, Vec c, Vec d) {
  const auto quarter = [](Vec v) -> Quad {
#if defined(__AVX512F__)
    const auto half =
        __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const auto half = v;
#endif
#if defined(__AVX2__)
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
           __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
    return half;
#endif
  };
  const Quad p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) +
                  __builtin_shufflevector(p, q, 2, 3, 6, 7);
  const Quad rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) +
                  __builtin_shufflevector(r, s, 2, 3, 6, 7);
  return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) +
         __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}

// value * 2^n for integers n, which may lie outside the exponents of a float.
DLKERNELS_INLINE Vec scale_by_power(Vec value, Vec n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(
      0xFFFF, reinterpret_cast<__m512>(value), reinterpret_cast<__m512>(n)));
#else
  const IntVec exponent = __builtin_convertvector(n, IntVec);
  const IntVec half = exponent >> 1;
  const Vec low = as_float(reinterpret_cast<UIntVec>((half + 127) << 23));
  const Vec high =
      as_float(reinterpret_cast<UIntVec>((exponent - half + 127) << 23));
  return value * low * high;
#endif
}

// e^r for r between -ln 2 / 2 and ln 2 / 2.
DLKERNELS_INLINE Vec exp_of_remainder(Vec r) {
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r) + 1.0f;
}

// e^x to about one unit in the last place; 0 below -103.97 (results under the
// smallest normal number keep fewer digits), infinity above 88.72.
DLKERNELS_INLINE Vec exp(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  constexpr float kRounder = 12582912.0f;
  // In this order of operands the hardware's own minimum and maximum keep NaN.
  const Vec lower = broadcast(-104.0f);
  const Vec upper = broadcast(89.0f);
  Vec clamped = lower > x ? lower : x;
  clamped = upper < clamped ? upper : clamped;
  const Vec shifted = clamped * 1.44269504088896341f + kRounder;
  const Vec n = shifted - kRounder;
  // ln 2 in two parts: n times the first is exact.
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  return scale_by_power(exp_of_remainder(r), n);
}

// 1 + e^-x, with less work than exp: where the power leaves the range of normal
// numbers it becomes 0 or infinity, which one more than it hardly differs from.
DLKERNELS_INLINE Vec inverse_sigmoid(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer; 127 more make it an exponent, which
  // then stands in the low bits.
  constexpr float kRounder = 12582912.0f + 127.0f;
  // In this order of operands the hardware's own minimum and maximum keep NaN.
  const Vec lower = broadcast(-88.8f);
  const Vec upper = broadcast(88.0f);
  Vec clamped = lower > x ? lower : x;
  clamped = upper < clamped ? upper : clamped;
  const Vec shifted = clamped * -1.44269504088896341f + kRounder;
  const Vec n = shifted - kRounder;
  const Vec r = (-clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  return exp_of_remainder(r) * as_float(as_bits(shifted) << 23) + 1.0f;
}

DLKERNELS_INLINE Vec sigmoid(Vec x) {
  return 1.0f / inverse_sigmoid(x);
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
