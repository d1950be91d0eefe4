#pragma once

#include <cstdint>

namespace dlkernels {

// The activations that follow a batch norm.
enum class Nonlinearity : int32_t {
  Identity,
  Relu,
  Relu6,
  LeakyRelu,
  Silu,
  HardSwish,
  Mish
};

}  // namespace dlkernels
