#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"
#include "batch_norm_act.h"

// Depthwise convolution between two batch norms with activations:
//
//   out = post(convolve(pre(x)))
//
// Contiguous maps are worked on channel by channel: all samples of a channel go
// through every pass, statistics included, while they lie in cache, so that
// each map is read or written once. Of channels_last maps the convolution works
// on kGroup channels of one sample, a cache line a pixel, on a few rows at a
// time that stay in the first-level cache; the norms' passes are those of
// batch_norm_act.
//
// Every kernel takes scratch memory of scratch_floats(), zeroed, for itself.

namespace dlkernels {

struct DepthwiseShape {
  ScalarType dtype;
  int64_t samples;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  int64_t kernel;
  int64_t stride;
  int64_t pad_top;
  int64_t pad_left;
};

// Channels that an item of channels_last maps covers.
constexpr int64_t kGroup = 16;

struct MbconvArgs {
  DepthwiseShape shape;
  // Norms by mean, scale and bias. Where the input has no norm, pre is the
  // identity and has_pre is false.
  bool has_pre;
  BatchNormActArgs pre;   // of x
  BatchNormActArgs post;  // of raw
  // [channels, kernel, kernel], or channels_last
  // [groups, kernel * kernel, kGroup].
  const float* weight;
  void* raw;  // the convolution's output
  // [channels, kernel, kernel], or channels_last
  // [samples, groups, kernel * kernel, kGroup].
  float* grad_weight;
};

struct MbconvKernels {
  int64_t (*scratch_floats)(
      const DepthwiseShape&, bool channels_last, bool backward);

  // pre, convolution and post without statistics, raw never stored; an item is
  // a channel, or a group, of one sample.
  void (*infer)(const MbconvArgs&, float* scratch, int64_t begin, int64_t end);
  void (*infer_last)(
      const MbconvArgs&, float* scratch, int64_t begin, int64_t end);

  // Contiguous maps; an item is a channel.
  void (*forward)(
      const MbconvArgs&, float* scratch, int64_t begin, int64_t end);
  void (*backward)(
      const MbconvArgs&, float* scratch, int64_t begin, int64_t end);

  // channels_last maps; an item is a group of one sample. raw from x, and
  // from the gradient of post's output, whose terms stand in post.partial,
  // grad_weight and, in pre.grad_x, the gradient of pre's norm, before its
  // activation. Its sums over each sample, [samples, 2, channels], are left in
  // pre.partial; without pre there are none.
  void (*convolve_last)(
      const MbconvArgs&, float* scratch, int64_t begin, int64_t end);
  void (*convolve_last_backward)(
      const MbconvArgs&, float* scratch, int64_t begin, int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(MbconvKernels, mbconv_kernels)

}  // namespace dlkernels
