#pragma once

// Activations and their slopes on vectors. Where a slope has two values, it is
// the one that PyTorch takes.

#include "../include/nonlinearity.h"
#include "vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {

struct Identity {
  DLKERNELS_MEMBER Vec value(Vec z) const {
    return z;
  }
  DLKERNELS_MEMBER Vec slope(Vec) const {
    return broadcast(1.0f);
  }
};

struct Relu {
  DLKERNELS_MEMBER Vec value(Vec z) const {
    return z < 0.0f ? Vec{} : z;
  }
  DLKERNELS_MEMBER Vec slope(Vec z) const {
    return z > 0.0f ? broadcast(1.0f) : Vec{};
  }
};

struct Relu6 {
  DLKERNELS_MEMBER Vec value(Vec z) const {
    const Vec positive = z < 0.0f ? Vec{} : z;
    return positive > 6.0f ? broadcast(6.0f) : positive;
  }
  DLKERNELS_MEMBER Vec slope(Vec z) const {
    return (z > 0.0f) & (z < 6.0f) ? broadcast(1.0f) : Vec{};
  }
};

struct LeakyRelu {
  float negative_slope;

  DLKERNELS_MEMBER Vec value(Vec z) const {
    return z > 0.0f ? z : z * negative_slope;
  }
  DLKERNELS_MEMBER Vec slope(Vec z) const {
    return z > 0.0f ? broadcast(1.0f) : broadcast(negative_slope);
  }
};

struct Silu {
  DLKERNELS_MEMBER Vec value(Vec z) const {
    return z / inverse_sigmoid(z);
  }
  DLKERNELS_MEMBER Vec slope(Vec z) const {
    const Vec s = sigmoid(z);
    return s * (1.0f + z * (1.0f - s));
  }
};

struct HardSwish {
  DLKERNELS_MEMBER Vec value(Vec z) const {
    return z * Relu6{}.value(z + 3.0f) * (1.0f / 6.0f);
  }
  DLKERNELS_MEMBER Vec slope(Vec z) const {
    const Vec inside = z * (1.0f / 3.0f) + 0.5f;
    const Vec upper = z < 3.0f ? inside : broadcast(1.0f);
    return z > -3.0f ? upper : Vec{};
  }
};

// z * tanh(log(1 + e^z)), where the tanh is n / (n + 2) with n = e^z (e^z + 2);
// from 20 on it is 1, before e^z can overflow.
struct Mish {
  DLKERNELS_MEMBER Vec value(Vec z) const {
    return z * tanh_softplus(exp(minimum(z, broadcast(20.0f))));
  }
  DLKERNELS_MEMBER Vec slope(Vec z) const {
    const Vec e = exp(minimum(z, broadcast(20.0f)));
    const Vec t = tanh_softplus(e);
    return t + z * (1.0f - t * t) * (e / (1.0f + e));
  }

 private:
  DLKERNELS_MEMBER static Vec tanh_softplus(Vec e) {
    const Vec n = e * (e + 2.0f);
    return n / (n + 2.0f);
  }
};

// Calls body(activation) with one of the types above.
template <typename Body>
DLKERNELS_INLINE void with_nonlinearity(
    Nonlinearity kind, float negative_slope, const Body& body) {
  switch (kind) {
    case Nonlinearity::Identity:
      return body(Identity{});
    case Nonlinearity::Relu:
      return body(Relu{});
    case Nonlinearity::Relu6:
      return body(Relu6{});
    case Nonlinearity::LeakyRelu:
      return body(LeakyRelu{negative_slope});
    case Nonlinearity::Silu:
      return body(Silu{});
    case Nonlinearity::HardSwish:
      return body(HardSwish{});
    case Nonlinearity::Mish:
      return body(Mish{});
  }
}

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
