#pragma once

// CPU kernels are compiled once per instruction set, each copy in a namespace
// of its own, and one is chosen at run time.
//
// A kernel file (csrc/cpu/kernels/<family>.cpp) is compiled with
// DLKERNELS_CPU_CAPABILITY set to one of the namespaces below. It must emit no
// weak symbols: the linker could otherwise keep the AVX-512 copy of an inline
// function and call it on a machine without AVX-512.

namespace dlkernels {

enum class CpuCapability { Default, Avx2, Avx512 };

// The best instruction set that this CPU has, or the lower one that the
// environment variable DLKERNELS_CPU_CAPABILITY (default, avx2, avx512) asks
// for. Decided once per process.
CpuCapability cpu_capability();

const char* name_of(CpuCapability capability);

}  // namespace dlkernels

// Declares the table of functions `name` of type `Table` that each copy of a
// kernel file defines, and a function of the same name that returns the copy
// for this CPU.
#if defined(__x86_64__)
#define DLKERNELS_DECLARE_CPU_KERNELS(Table, name) \
  namespace cpu_default {                          \
  extern const Table name;                         \
  }                                                \
  namespace cpu_avx2 {                             \
  extern const Table name;                         \
  }                                                \
  namespace cpu_avx512 {                           \
  extern const Table name;                         \
  }                                                \
  static inline const Table& name() {              \
    switch (cpu_capability()) {                    \
      case CpuCapability::Avx512:                  \
        return cpu_avx512::name;                   \
      case CpuCapability::Avx2:                    \
        return cpu_avx2::name;                     \
      default:                                     \
        return cpu_default::name;                  \
    }                                              \
  }
#else
#define DLKERNELS_DECLARE_CPU_KERNELS(Table, name) \
  namespace cpu_default {                          \
  extern const Table name;                         \
  }                                                \
  static inline const Table& name() {              \
    return cpu_default::name;                      \
  }
#endif
