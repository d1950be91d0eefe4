#pragma once

// What the launchers of squeeze_excite check before any memory is touched.
// Messages for users come from dlkernels/squeeze_excite/op.py; these guard
// direct calls of the dispatcher's op.

#include <string>

#include "squeeze_excite.h"
#include "tensor.h"

namespace dlkernels {

inline Activation activation_of(const std::string& name) {
  STD_TORCH_CHECK(
      name == "relu" || name == "silu",
      "activation must be relu or silu, but is ",
      name);
  return name == "relu" ? Activation::Relu : Activation::Silu;
}

inline Gate gate_of(const std::string& name) {
  STD_TORCH_CHECK(
      name == "sigmoid" || name == "hard_sigmoid",
      "gate must be sigmoid or hard_sigmoid, but is ",
      name);
  return name == "sigmoid" ? Gate::Sigmoid : Gate::HardSigmoid;
}

inline void check_weights(
    const Tensor& x, const Tensor& reduce_weight, const Tensor& expand_weight) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape [N, C, H, W]");
  STD_TORCH_CHECK(
      reduce_weight.dim() == 2 && reduce_weight.size(1) == x.size(1),
      "reduce_weight must have shape [R, C]");
  STD_TORCH_CHECK(
      expand_weight.dim() == 2 && expand_weight.size(0) == x.size(1) &&
          expand_weight.size(1) == reduce_weight.size(0),
      "expand_weight must have shape [C, R]");
  STD_TORCH_CHECK(
      reduce_weight.scalar_type() == x.scalar_type() &&
          expand_weight.scalar_type() == x.scalar_type(),
      "the weights must have the dtype of x");
}

inline void check_bias(
    const Tensor& x,
    const std::optional<Tensor>& bias,
    int64_t size,
    const char* name) {
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == size &&
                bias->scalar_type() == x.scalar_type()),
      name,
      " must have one element per output feature and the dtype of x");
}

inline void check_maps(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(
      other.sizes() == x.sizes() && other.scalar_type() == x.scalar_type(),
      name,
      " must have the shape and dtype of x");
}

}  // namespace dlkernels
