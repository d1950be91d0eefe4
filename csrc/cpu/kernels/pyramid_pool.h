#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"

namespace dlkernels {

// Maps, and their maxima over 13, 9 and 5 pixels before them, [samples,
// 4 * channels, height, width]. A maximum over 9 pixels is that over 5 of the
// maxima over 5, and so on: a cascade of stages, of 5 x 5 pixels each.
constexpr int64_t kPoolStages = 3;
constexpr int64_t kPoolBlocks = kPoolStages + 1;

struct PyramidPoolArgs {
  ScalarType dtype;
  bool channels_last;
  int64_t samples;
  int64_t channels;
  int64_t height;
  int64_t width;
  const void* x;
  const void* grad_out;  // like the output; null in the forward pass
  void* result;          // the output, or the gradient of x

  int64_t area() const {
    return height * width;
  }
};

// An item is a group of channels of a sample, whose maps are held in scratch
// memory.
struct PyramidPoolKernels {
  int64_t group;  // channels
  // Of scratch memory, for one thread.
  int64_t (*forward_floats)(const PyramidPoolArgs&);
  int64_t (*backward_floats)(const PyramidPoolArgs&);
  void (*forward)(
      const PyramidPoolArgs&, float* scratch, int64_t begin, int64_t end);
  // Each gradient goes to the first maximum of its window, or to the last NaN,
  // as in torch.
  void (*backward)(
      const PyramidPoolArgs&, float* scratch, int64_t begin, int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(PyramidPoolKernels, pyramid_pool_kernels)

}  // namespace dlkernels
