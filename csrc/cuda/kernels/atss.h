#pragma once

#include "../../include/atss.h"
#include "../stream.h"

namespace dlkernels::cuda {

// A candidate of a box on some level.
struct AtssCandidate {
  int64_t anchor;
  float iou;            // kAbsent: the level has no further anchor
  float iou_if_inside;  // -1 where the anchor's centre lies outside the box
};

struct AtssAssign {
  atss::Assign assign;
  atss::Exclude exclude;      // read where assign.exclusions is not null
  AtssCandidate* candidates;  // [images, max_boxes, slots], workspace
  int64_t* assigned;          // [images, count], the memory of assign.claims
  float* iou;                 // [images, count]
};

void atss_assign(const AtssAssign& args, Stream stream);

}  // namespace dlkernels::cuda
