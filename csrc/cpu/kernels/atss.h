#pragma once

#include "../../include/atss.h"
#include "../capability.h"

// The steps of ATSS assignment. Each works on a range of items, so that a
// launcher can share the items out among threads.

namespace dlkernels {

// Centres of arbitrary anchors, so that a scan reads them as vectors; NaN where
// an anchor is excluded.
struct AtssCentres {
  float* x;              // [count] or [images, count]; null for grids
  float* y;              // likewise
  int64_t image_stride;  // floats from one image's centres to the next's
};

// A box that exists: padding is left out.
struct AtssBox {
  int64_t image;
  int64_t box;
};

// What the work on one box needs. Arrays of `capacity` elements hold the slots
// of a box and may be read and written up to a whole vector.
struct AtssWorkspace {
  uint64_t* orders;      // [k]
  int64_t* anchors;      // [capacity]
  float* boxes;          // [4, capacity]: x1, y1, x2, y2 of the candidates
  float* iou;            // [capacity]
  float* iou_if_inside;  // [capacity]
  int64_t capacity;
};

constexpr int64_t kAtssSlotAlignment = 16;

struct AtssKernels {
  // An item is an anchor of all images' anchors, one after another.
  void (*exclude)(
      const atss::Assign&, const atss::Exclude&, int64_t begin, int64_t end);
  // An item is an element of the centres.
  void (*centres)(
      const atss::Assign&, const AtssCentres&, int64_t begin, int64_t end);
  // Claims the positive anchors of each box; an item is an entry of `boxes`.
  void (*claim)(
      const atss::Assign&,
      const AtssCentres&,
      const AtssBox* boxes,
      const AtssWorkspace&,
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
