#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

#include "nonlinearity.h"

namespace dlkernels {

inline Nonlinearity nonlinearity_of(const std::string& name) {
  struct Entry {
    const char* name;
    Nonlinearity value;
  };
  for (const Entry& entry :
       {Entry{"identity", Nonlinearity::Identity},
        Entry{"relu", Nonlinearity::Relu},
        Entry{"relu6", Nonlinearity::Relu6},
        Entry{"leaky_relu", Nonlinearity::LeakyRelu},
        Entry{"silu", Nonlinearity::Silu},
        Entry{"hardswish", Nonlinearity::HardSwish},
        Entry{"mish", Nonlinearity::Mish}}) {
    if (name == entry.name) {
      return entry.value;
    }
  }
  STD_TORCH_CHECK(false, "unknown activation ", name);
  return Nonlinearity::Identity;
}

}  // namespace dlkernels
