// Kernels with one fault each: what the proof must find.

#include <algorithm>
#include <string>

#include "../../../csrc/cuda/launch.h"

using dlkernels::cuda::launch;

// Reverses a block's values through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(float* values) {
  DLKERNELS_SHARED(float, copy, 64);
  copy[threadIdx.x] = values[threadIdx.x];
  if (kBarrier) {
    __syncthreads();
  }
  values[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void divergent_kernel(float* values) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
  values[threadIdx.x] = 0.0f;
}

__global__ void divergent_shuffle_kernel(float* values) {
  if (threadIdx.x % 2 == 0) {
    values[threadIdx.x] = dlkernels::cuda::warp_sum(1.0f);
  }
}

__global__ void shared_overrun_kernel(float* values) {
  DLKERNELS_SHARED(float, copy, 63);
  copy[threadIdx.x] = values[threadIdx.x];
}

__global__ void overrun_kernel(float* values) {
  values[threadIdx.x + 1] = 0.0f;
}

__global__ void race_kernel(float* values) {
  values[0] = static_cast<float>(blockIdx.x);
}

__global__ void warp_sum_kernel(float* values) {
  values[threadIdx.x] = dlkernels::cuda::warp_sum(values[threadIdx.x]);
}

// Runs a kernel on 0 .. 63 and prints what it left.
void show(void (*kernel)(float*), int64_t blocks, const std::string& order) {
  using cuda_on_cpu::Order;
  cuda_on_cpu::order = order == "forward"    ? Order::Forward
                       : order == "backward" ? Order::Backward
                                             : Order::Shuffled;
  const cuda_on_cpu::Memory memory(64 * sizeof(float));
  auto* values = static_cast<float*>(memory.data());
  for (int i = 0; i < 64; ++i) {
    values[i] = static_cast<float>(i);
  }
  launch(kernel, blocks, 64, nullptr, values);
  for (int i = 0; i < 64; ++i) {
    std::printf("%g ", values[i]);
  }
}

int main(int, char** arguments) {
  const std::string fault = arguments[1];
  const std::string order = arguments[2];
  if (fault == "none") {
    show(reverse_kernel<true>, 1, order);
  } else if (fault == "missing barrier") {
    show(reverse_kernel<false>, 1, order);
  } else if (fault == "divergent barrier") {
    show(divergent_kernel, 1, order);
  } else if (fault == "divergent shuffle") {
    show(divergent_shuffle_kernel, 1, order);
  } else if (fault == "shared overrun") {
    show(shared_overrun_kernel, 1, order);
  } else if (fault == "overrun") {
    show(overrun_kernel, 1, order);
  } else if (fault == "race between blocks") {
    show(race_kernel, 3, order);
  } else if (fault == "warp sum") {
    show(warp_sum_kernel, 1, order);
  }
}
