#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../include/tensor.h"
#include "stream.h"

namespace dlkernels::cuda {

// PyTorch's current stream on the tensor's device.
inline Stream stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

}  // namespace dlkernels::cuda
