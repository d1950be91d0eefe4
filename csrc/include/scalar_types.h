#pragma once

#include <cstdint>

// The element types of the contract, as kernels that know no torch see them.
namespace dlkernels {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class ScalarType : int32_t { Float, BFloat16, Half };

// Calls `body` with a null pointer of the C++ type that `type` stands for:
//   dispatch(type, [&](auto* tag) { using T = std::remove_pointer_t<...>; });
template <typename Body>
static inline void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<Half*>(nullptr));
  }
}

}  // namespace dlkernels
