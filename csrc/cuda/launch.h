#pragma once

// What kernels need of CUDA, behind names that tests can give another meaning:
// there the same source is compiled as C++ and runs on the CPU, block by block
// (tests/gpu_proof/cuda_on_cpu).

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../include/scalar_types.h"
#include "stream.h"

#if defined(DLKERNELS_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

// An array in shared memory.
#define DLKERNELS_SHARED(type, name, size) __shared__ type name[size]

namespace dlkernels::cuda {

// Errors of a launch stay for cudaGetLastError, which the launcher asks.
template <typename... Parameters>
void launch(
    void (*kernel)(Parameters...),
    int64_t blocks,
    int threads,
    Stream stream,
    std::type_identity_t<Parameters>... args) {
  if (blocks > 0) {
    void* pointers[] = {&args...};
    cudaLaunchKernel(
        reinterpret_cast<const void*>(kernel),
        dim3(static_cast<unsigned>(blocks)),
        dim3(threads),
        pointers,
        0,
        stream);
  }
}

// One access of 16 bytes: nvcc splits a plain assignment for some targets.
__device__ inline void write_vector(uint4* to, uint4 bits) {
  __stwb(to, bits);
}

// Raises the number to the value where it is smaller, atomically.
__device__ inline void raise_to(uint64_t* number, uint64_t value) {
  atomicMax(
      reinterpret_cast<unsigned long long*>(number),
      static_cast<unsigned long long>(value));
}

__device__ inline float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ inline uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

}  // namespace dlkernels::cuda
#endif

namespace dlkernels::cuda {

constexpr int kWarpSize = 32;

__device__ inline float to_float(float value) {
  return value;
}

__device__ inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

__device__ inline float to_float(Half value) {
  return half_to_float(value.bits);
}

__device__ inline void assign(float& to, float value) {
  to = value;
}

__device__ inline void assign(BFloat16& to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0);
}

__device__ inline void assign(Half& to, float value) {
  to.bits = float_to_half(value);
}

// kVec neighbours as floats.
template <int kVec>
struct Floats {
  float values[kVec];
};

// Reads kVec neighbours, 16 bytes at a time where there is more than one; the
// address is then a multiple of 16 bytes.
template <int kVec, typename T>
__device__ Floats<kVec> load(const T* from) {
  Floats<kVec> result;
  if constexpr (kVec == 1) {
    result.values[0] = to_float(*from);
  } else {
    constexpr int kStep = sizeof(uint4) / sizeof(T);
    static_assert(kVec % kStep == 0);
    for (int first = 0; first < kVec; first += kStep) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + first);
      T values[kStep];
      memcpy(values, &bits, sizeof(bits));
      for (int v = 0; v < kStep; ++v) {
        result.values[first + v] = to_float(values[v]);
      }
    }
  }
  return result;
}

// Writes kVec neighbours likewise.
template <int kVec, typename T>
__device__ void store(T* to, const Floats<kVec>& from) {
  if constexpr (kVec == 1) {
    assign(*to, from.values[0]);
  } else {
    constexpr int kStep = sizeof(uint4) / sizeof(T);
    static_assert(kVec % kStep == 0);
    for (int first = 0; first < kVec; first += kStep) {
      T values[kStep];
      for (int v = 0; v < kStep; ++v) {
        assign(values[v], from.values[first + v]);
      }
      uint4 bits;
      memcpy(&bits, values, sizeof(bits));
      write_vector(reinterpret_cast<uint4*>(to + first), bits);
    }
  }
}

// The sum over the threads of a warp, in every one of them.
__device__ inline float warp_sum(float value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

}  // namespace dlkernels::cuda
