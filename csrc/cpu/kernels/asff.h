#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"

// The passes of asff_fuse. Each works on a range of items, so that a launcher
// can share the items out among threads.

namespace dlkernels {

constexpr int64_t kMaxLevels = 5;

// The pyramid and the size [height, width] that it is fused at.
struct Pyramid {
  struct Level {
    const void* x;   // [samples, channels, height / factor, width / factor]
    void* grad;      // like x; not used in the forward pass
    int64_t factor;  // 1, 2, 4 or 8
  };

  ScalarType dtype;
  bool channels_last;
  bool bilinear;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t coarsest;  // the largest factor
  int64_t num_levels;
  Level levels[kMaxLevels];
};

// Maps [samples, levels, height, width], contiguous or channels_last.
struct Logits {
  ScalarType dtype;
  bool channels_last;
  int64_t num_levels;
  int64_t height;
  int64_t width;
};

// Passes over contiguous maps enlarge a strip of rows at a time, of several
// planes (channels of a sample) that share their weights.
constexpr int64_t kPlanes = 4;

// Where the parts of one thread's scratch memory start, in floats.
struct Scratch {
  int64_t strip_rows;
  int64_t narrow;  // a strip's rows before they are enlarged
  int64_t narrow_stride;
  int64_t wide[kMaxLevels][kPlanes];    // a strip, enlarged
  int64_t grad[kPlanes];                // a strip of grad_out
  int64_t shrunk[kMaxLevels][kPlanes];  // grad of a level, shrunk in height
  int64_t shrunk_stride;
  int64_t columns[3];  // rows while they are shrunk in width
  int64_t dots;        // [levels, height, width]
  int64_t size;
};

static inline Scratch scratch_of(const Pyramid& pyramid) {
  // Vectors of up to 16 floats are read and written from any float of a row on,
  // and from the one before it.
  constexpr int64_t kPadding = 32;
  constexpr int64_t kStripSize = 512;
  Scratch scratch{};
  const auto take = [&](int64_t floats) {
    const int64_t start = scratch.size + kPadding;
    scratch.size = start + (floats + 15) / 16 * 16 + kPadding;
    return start;
  };
  const int64_t cells = kStripSize / (pyramid.coarsest * pyramid.width);
  scratch.strip_rows = pyramid.coarsest * (cells > 1 ? cells : 1);
  const int64_t strip = scratch.strip_rows * pyramid.width;
  scratch.narrow_stride = (pyramid.width / 2 + 15) / 16 * 16 + kPadding;
  scratch.narrow = take(scratch.strip_rows * scratch.narrow_stride);
  scratch.shrunk_stride = (pyramid.width + 15) / 16 * 16;
  for (int64_t plane = 0; plane < kPlanes; ++plane) {
    scratch.grad[plane] = take(strip);
    for (int64_t l = 0; l < pyramid.num_levels; ++l) {
      const int64_t factor = pyramid.levels[l].factor;
      scratch.wide[l][plane] = take(strip);
      if (factor > 1) {
        scratch.shrunk[l][plane] =
            take(pyramid.height / factor * scratch.shrunk_stride);
      }
    }
  }
  for (int64_t& column : scratch.columns) {
    column = take(pyramid.width);
  }
  scratch.dots = take(pyramid.num_levels * pyramid.height * pyramid.width);
  return scratch;
}

struct AsffKernels {
  // weights [samples, levels, height, width] = softmax of logits over levels;
  // an item is a row of a sample.
  void (*softmax)(
      const Logits&,
      const void* logits,
      float* weights,
      int64_t begin,
      int64_t end);
  // grad_logits, given `dots`, the gradient of the weights: the sum of
  // [samples, parts, levels, height, width] over its parts. Likewise by rows.
  void (*softmax_backward)(
      const Logits&,
      const float* weights,
      const float* dots,
      int64_t parts,
      void* grad_logits,
      int64_t begin,
      int64_t end);

  // out = sum over levels of weights * enlarged level. An item is a channel of
  // a sample, or a row of a sample where channels lie last.
  void (*fuse_contiguous)(
      const Pyramid&,
      const float* weights,
      void* out,
      float* scratch,
      int64_t begin,
      int64_t end);
  void (*fuse_channels_last)(
      const Pyramid&,
      const float* weights,
      void* out,
      int64_t begin,
      int64_t end);

  // The gradients of the levels, and `dots`. An item is one of the `parts` of a
  // sample's channels, whose share of the dots it writes.
  void (*fuse_backward_contiguous)(
      const Pyramid&,
      const float* weights,
      const void* grad_out,
      float* dots,
      int64_t parts,
      float* scratch,
      int64_t begin,
      int64_t end);
  // The same where channels lie last. An item is a band of `coarsest` rows of a
  // sample, and the dots have one part.
  void (*fuse_backward_channels_last)(
      const Pyramid&,
      const float* weights,
      const void* grad_out,
      float* dots,
      int64_t begin,
      int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(AsffKernels, asff_kernels)

}  // namespace dlkernels
