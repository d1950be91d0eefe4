#pragma once

// The stream that launches go to, for headers that host compilers read.

#if defined(DLKERNELS_CUDA_ON_CPU)
namespace dlkernels::cuda {
using Stream = void*;
}
#else
#include <cuda_runtime_api.h>
namespace dlkernels::cuda {
using Stream = cudaStream_t;
}
#endif
