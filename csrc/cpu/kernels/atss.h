#pragma once

#include "../../include/atss.h"
#include "../capability.h"

// The steps of ATSS assignment. Each works on a range of items, so that a
// launcher can share the items out among threads.

namespace dlkernels {

// Centres of arbitrary anchors, so that a scan reads them as vectors.
struct AtssCentres {
  const float* x;        // [count] or [images, count]; null for grids
  const float* y;        // likewise
  int64_t image_stride;  // floats from one image's centres to the next's
};

// A box that exists: padding is left out.
struct AtssBox {
  int64_t image;
  int64_t box;
};

struct AtssKernels {
  // An item is an anchor of all images' anchors, one after another.
  void (*exclude)(
      const atss::Assign&, const atss::Exclude&, int64_t begin, int64_t end);
  // x[i], y[i] = the centre of boxes[i]; an item is an anchor.
  void (*centres)(
      const float* boxes, float* x, float* y, int64_t begin, int64_t end);
  // Claims the positive anchors of each box; an item is an entry of `boxes`.
  // Workspace: k orders, slots candidates.
  void (*claim)(
      const atss::Assign&,
      const AtssCentres&,
      const AtssBox* boxes,
      uint64_t* orders,
      atss::Candidate* candidates,
      int64_t begin,
      int64_t end);
  // Turns claims into indices, in place, and IoUs; an item is an anchor of all
  // images' anchors.
  void (*resolve)(
      const atss::Assign&,
      int64_t* assigned,
      float* iou,
      int64_t begin,
      int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(AtssKernels, atss_kernels)

}  // namespace dlkernels
