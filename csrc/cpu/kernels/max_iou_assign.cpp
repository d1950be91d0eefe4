// Every instruction set gives the same bits, and so do both passes.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "max_iou_assign.h"

#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

DLKERNELS_INLINE Vec greater(Vec a, Vec b) {
  return a > b ? a : b;
}

DLKERNELS_INLINE Vec smaller(Vec a, Vec b) {
  return a < b ? a : b;
}

struct Anchors {
  Vec x1, y1, x2, y2, area;

  template <typename Lanes>
  DLKERNELS_INLINE Anchors
  of(const AnchorPlanes& planes, int64_t i, Lanes lanes) {
    Anchors anchors;
    anchors.x1 = load(planes.x1 + i, lanes);
    anchors.y1 = load(planes.y1 + i, lanes);
    anchors.x2 = load(planes.x2 + i, lanes);
    anchors.y2 = load(planes.y2 + i, lanes);
    anchors.area = (anchors.x2 - anchors.x1) * (anchors.y2 - anchors.y1);
    return anchors;
  }
};

// Calls body(iou) with the IoUs of a box if any of the anchors overlaps it.
template <typename Body>
DLKERNELS_INLINE void if_overlapping(
    const Anchors& anchors, const float* box, const Body& body) {
  const Vec width = smaller(anchors.x2, broadcast(box[2])) -
                    greater(anchors.x1, broadcast(box[0]));
  const Vec height = smaller(anchors.y2, broadcast(box[3])) -
                     greater(anchors.y1, broadcast(box[1]));
  const IntVec overlapping = (width > 0.0f) & (height > 0.0f);
  if (any(overlapping)) {
    const float area = (box[2] - box[0]) * (box[3] - box[1]);
    const Vec overlap = width * height;
    const Vec iou = overlap / (area + anchors.area - overlap);
    body(overlapping & (overlap > 0.0f) ? iou : Vec{});
  }
}

void highest(
    const AnchorPlanes& planes, float* highest, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    Vec best{};
    for_each_vec(planes.anchors, [&](int64_t i, auto lanes) {
      const Anchors anchors = Anchors::of(planes, i, lanes);
      if_overlapping(anchors, planes.boxes + 4 * g, [&](Vec iou) {
        best = greater(iou, best);
      });
    });
    highest[g] = 0.0f;
    for (int64_t lane = 0; lane < kVecSize; ++lane) {
      highest[g] = best[lane] > highest[g] ? best[lane] : highest[g];
    }
  }
}

void assign(
    const AnchorPlanes& planes,
    const MaxIouThresholds& thresholds,
    const float* highest,
    int64_t* assigned,
    float* iou,
    int64_t begin,
    int64_t end) {
  for_each_vec(end - begin, [&](int64_t offset, auto lanes) {
    const int64_t first = begin + offset;
    const Anchors anchors = Anchors::of(planes, first, lanes);
    Vec best{};
    IntVec index = IntVec{} - 1;
    IntVec reached{};
    for (int64_t g = 0; g < planes.count; ++g) {
      if_overlapping(anchors, planes.boxes + 4 * g, [&](Vec value) {
        const IntVec better = value > best;
        best = better ? value : best;
        index = better ? IntVec{} + static_cast<int32_t>(g) : index;
        if (highest != nullptr) {
          reached |= (value == highest[g]) & (value > 0.0f);
        }
      });
    }
    const IntVec positive = (best >= thresholds.positive) | reached;
    const IntVec negative =
        best >= thresholds.negative ? IntVec{} - 2 : IntVec{} - 1;
    const IntVec result = positive ? index : negative;
    store(iou + first, positive ? best : Vec{}, lanes);
    const int64_t rest = end - first;
    const int64_t count = rest < kVecSize ? rest : kVecSize;
    for (int64_t lane = 0; lane < count; ++lane) {
      assigned[first + lane] = result[lane];
    }
  });
}

}  // namespace

extern const MaxIouKernels max_iou_kernels = {highest, assign};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
