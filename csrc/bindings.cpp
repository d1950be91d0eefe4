#include <pybind11/pybind11.h>

#include "build_info.h"

// dlkernels._info: what this build holds. It links against no torch, so that it
// loads, and can say what is wrong, where the kernels do not.
PYBIND11_MODULE(_info, m) {
  m.doc() = "What this build of dlkernels holds.";
  m.attr("version") = kVersion;
  m.attr("torch_version") = kTorchVersion;
  m.attr("target_torch_version") = kTargetTorchVersion;
  m.attr("cpu_capabilities") = kCpuCapabilities;
  m.attr("cuda_version") = kCudaVersion;
  m.attr("cuda_arch_list") = kCudaArchList;
  m.attr("no_cuda_reason") = kNoCudaReason;
}
