#pragma once

#include <cstdint>

// The choices of squeeze_excite, as CPU and CUDA kernels know them.

namespace dlkernels {

enum class Activation : int32_t { Relu, Silu };
enum class Gate : int32_t { Sigmoid, HardSigmoid };

}  // namespace dlkernels
