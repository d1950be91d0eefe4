#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

// The shared object of the CPU kernels. Each family registers its kernels in
// csrc/cpu/<family>.cpp; the schemas stand beside the public functions in
// dlkernels/<family>/op.py, where an install without this object finds them
// too. What is here belongs to no family.

namespace dlkernels {
namespace {

std::string cpu_capability_name() {
  return name_of(cpu_capability());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability_name));
}

}  // namespace dlkernels
