#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"

// Each anchor's best box, found by comparing a range of anchors with all boxes
// of its image; no matrix is stored.

namespace dlkernels {

// The anchors of one image, coordinate by coordinate, and its boxes. An anchor
// that is not valid has x1 = infinity and x2 = -infinity: it overlaps nothing.
struct AnchorPlanes {
  int64_t anchors;
  const float* x1;
  const float* y1;
  const float* x2;
  const float* y2;
  int64_t count;       // of boxes
  const float* boxes;  // [count, 4]
};

struct MaxIouThresholds {
  float positive;
  float negative;
};

struct MaxIouKernels {
  // highest[g] = the highest IoU of box g with any anchor, for a range of
  // boxes.
  void (*highest)(
      const AnchorPlanes&, float* highest, int64_t begin, int64_t end);
  // assigned and iou of a range of anchors. `highest` is null, or makes the
  // anchors that reach it positive.
  void (*assign)(
      const AnchorPlanes&,
      const MaxIouThresholds&,
      const float* highest,
      int64_t* assigned,
      float* iou,
      int64_t begin,
      int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(MaxIouKernels, max_iou_kernels)

}  // namespace dlkernels
