#include "capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dlkernels {
namespace {

CpuCapability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return CpuCapability::Avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return CpuCapability::Avx2;
  }
#endif
  return CpuCapability::Default;
}

CpuCapability chosen_capability() {
  const CpuCapability best = best_capability();
  const char* asked = std::getenv("DLKERNELS_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') {
    return best;
  }
  for (CpuCapability level :
       {CpuCapability::Default, CpuCapability::Avx2, CpuCapability::Avx512}) {
    if (std::strcmp(asked, name_of(level)) == 0) {
      // A level that the CPU lacks would crash at its first instruction.
      return level < best ? level : best;
    }
  }
  throw std::runtime_error(
      std::string(
          "DLKERNELS_CPU_CAPABILITY must be default, avx2 or avx512, "
          "but is ") +
      asked);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = chosen_capability();
  return capability;
}

const char* name_of(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::Avx512:
      return "avx512";
    case CpuCapability::Avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace dlkernels
