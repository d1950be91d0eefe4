#pragma once

// The arithmetic of ATSS (Zhang et al., "Bridging the Gap Between Anchor-based
// and Anchor-free Detection via Adaptive Training Sample Selection", 2020),
// written once for CPU and CUDA kernels. The results are the same bits
// everywhere: each operation is rounded to its type, in the order given here,
// and products are never contracted with sums.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DLKERNELS_SHARED_CODE __host__ __device__ inline
#else
#define DLKERNELS_SHARED_CODE static inline __attribute__((always_inline))
#endif

namespace dlkernels::atss {

// The functions of boxes take floats, or vectors of floats on the CPU: masks
// are therefore combined by & and not by &&.

// A product that no compiler contracts with a sum. (CPU kernel files switch
// contraction off.)
template <typename T>
DLKERNELS_SHARED_CODE T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

template <typename T>
DLKERNELS_SHARED_CODE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
DLKERNELS_SHARED_CODE T larger(T a, T b) {
  return a > b ? a : b;
}

// ---- boxes --------------------------------------------------------------

template <typename T>
struct BoxOf {
  T x1, y1, x2, y2;
};

using Box = BoxOf<float>;

template <typename T>
DLKERNELS_SHARED_CODE T centre(T low, T high) {
  return (low + high) / 2.0f;
}

template <typename T>
DLKERNELS_SHARED_CODE T squared_distance(T x, T y, T other_x, T other_y) {
  const T dx = x - other_x;
  const T dy = y - other_y;
  return product(dx, dx) + product(dy, dy);
}

// Neither NaN nor infinite nor inverted; only such boxes get anchors.
DLKERNELS_SHARED_CODE bool is_proper(const Box& box) {
  const float width = box.x2 - box.x1;
  const float height = box.y2 - box.y1;
  return width >= 0.0f && width < INFINITY && height >= 0.0f &&
         height < INFINITY;
}

template <typename T>
DLKERNELS_SHARED_CODE T area(const BoxOf<T>& box) {
  return product(box.x2 - box.x1, box.y2 - box.y1);
}

template <typename T>
DLKERNELS_SHARED_CODE T intersection(const BoxOf<T>& a, const BoxOf<T>& b) {
  const T width = smaller(a.x2, b.x2) - larger(a.x1, b.x1);
  const T height = smaller(a.y2, b.y2) - larger(a.y1, b.y1);
  return product(larger(width, T{}), larger(height, T{}));
}

// 0 where the boxes do not overlap, whatever their areas.
template <typename T>
DLKERNELS_SHARED_CODE T iou(const BoxOf<T>& anchor, const BoxOf<T>& box) {
  const T common = intersection(anchor, box);
  const T whole = (area(anchor) + area(box)) - common;
  return common > 0.0f ? common / whole : T{};
}

// `value` where the anchor's centre lies inside the box, else -1.
template <typename T>
DLKERNELS_SHARED_CODE T
if_centre_inside(const BoxOf<T>& anchor, const BoxOf<T>& box, T value) {
  constexpr float kMargin = 0.01f;
  const T x = centre(anchor.x1, anchor.x2);
  const T y = centre(anchor.y1, anchor.y2);
  const auto inside = (x - box.x1 > kMargin) & (y - box.y1 > kMargin) &
                      (box.x2 - x > kMargin) & (box.y2 - y > kMargin);
  return inside ? value : T{} - 1.0f;
}

// ---- anchors ------------------------------------------------------------

constexpr int kMaxLevels = 16;

// A level of `height` times `width` cells with `per_cell` anchors each.
// Arbitrary anchors are a single row of cells with one anchor each.
struct Level {
  int64_t first;  // index of its first anchor
  int64_t count;  // of anchors
  int64_t height;
  int64_t width;
  float stride;
};

struct Anchors {
  const float* boxes;    // grid: [levels, per_cell, 4], around a cell's centre;
                         // else [count, 4] or [images, count, 4]
  int64_t image_stride;  // floats from one image's anchors to the next's
  int64_t count;         // of all levels
  int64_t per_cell;
  float offset;  // grid: the centre of cell (0, 0), in cells
  int64_t num_levels;
  Level levels[kMaxLevels];
};

DLKERNELS_SHARED_CODE Box box_at(const float* coordinates, int64_t index) {
  Box box;
#if defined(__CUDA_ARCH__)
  const float4 wide = reinterpret_cast<const float4*>(coordinates)[index];
  box = {wide.x, wide.y, wide.z, wide.w};
#else
  memcpy(&box, coordinates + 4 * index, sizeof(box));
#endif
  return box;
}

DLKERNELS_SHARED_CODE float cell_centre(
    const Anchors& anchors, const Level& level, int64_t cell) {
  return product(static_cast<float>(cell) + anchors.offset, level.stride);
}

// The anchor at position `i` of a level.
template <bool kGrid>
DLKERNELS_SHARED_CODE Box
anchor_at(const Anchors& anchors, int64_t image, int64_t l, int64_t i) {
  const Level& level = anchors.levels[l];
  if constexpr (!kGrid) {
    return box_at(
        anchors.boxes + image * anchors.image_stride, level.first + i);
  } else {
    // Divisions of 32 bits are quicker, and enough within a level.
    const auto per_cell = static_cast<uint32_t>(anchors.per_cell);
    const auto width = static_cast<uint32_t>(level.width);
    const uint32_t cell = static_cast<uint32_t>(i) / per_cell;
    const Box base = box_at(
        anchors.boxes, l * per_cell + static_cast<uint32_t>(i) % per_cell);
    const float x = cell_centre(anchors, level, cell % width);
    const float y = cell_centre(anchors, level, cell / width);
    return {x + base.x1, y + base.y1, x + base.x2, y + base.y2};
  }
}

// The level that anchor `index` lies on.
DLKERNELS_SHARED_CODE int64_t level_of(const Anchors& anchors, int64_t index) {
  int64_t l = 0;
  while (index >= anchors.levels[l].first + anchors.levels[l].count) {
    ++l;
  }
  return l;
}

// ---- which cells of a grid can hold the nearest anchors -----------------

struct Range {
  int64_t begin;
  int64_t end;
};

struct Window {
  Range rows;
  Range columns;
};

DLKERNELS_SHARED_CODE int64_t size_of(const Range& range) {
  return range.end - range.begin;
}

// `size` cells of an axis around a point: nearly the nearest ones.
DLKERNELS_SHARED_CODE Range cells_around(
    const Anchors& anchors,
    const Level& level,
    int64_t cells,
    float point,
    int64_t size) {
  const float first = point / level.stride - anchors.offset -
                      0.5f * static_cast<float>(size - 1) + 0.5f;
  const float last = static_cast<float>(cells - size);
  // In floats first: the point may be too far away for an integer.
  const auto begin =
      static_cast<int64_t>(first > 0.0f ? smaller(first, last) : 0.0f);
  return {begin, begin + size};
}

// How far the centre of a base anchor's copy in a cell is from the point, along
// one axis. Rounding keeps it monotone on each side of the point.
DLKERNELS_SHARED_CODE float distance_along(
    const Anchors& anchors,
    const Level& level,
    int64_t cell,
    float base_low,
    float base_high,
    float point) {
  const float shift = cell_centre(anchors, level, cell);
  const float distance = centre(shift + base_low, shift + base_high) - point;
  return distance < 0.0f ? -distance : distance;
}

// The largest distance between the point and an anchor of the window.
DLKERNELS_SHARED_CODE float reach_of(
    const Anchors& anchors, int64_t l, const Window& window, float x, float y) {
  const Level& level = anchors.levels[l];
  float reach = 0.0f;
  for (int64_t a = 0; a < anchors.per_cell; ++a) {
    const Box base = box_at(anchors.boxes, l * anchors.per_cell + a);
    const auto dx = [&](int64_t column) {
      return distance_along(anchors, level, column, base.x1, base.x2, x);
    };
    const auto dy = [&](int64_t row) {
      return distance_along(anchors, level, row, base.y1, base.y2, y);
    };
    const float across =
        larger(dx(window.columns.begin), dx(window.columns.end - 1));
    const float down = larger(dy(window.rows.begin), dy(window.rows.end - 1));
    const float distance = sqrtf(product(across, across) + product(down, down));
    reach = larger(reach, distance);
  }
  return reach;
}

// Widens the range by the cells that hold an anchor within `reach`. Distances
// grow away from the point, so the first cell without one ends the search.
DLKERNELS_SHARED_CODE Range widen(
    const Anchors& anchors,
    int64_t l,
    int64_t cells,
    Range range,
    int axis,
    float point,
    float reach) {
  const Level& level = anchors.levels[l];
  const auto within = [&](int64_t cell) {
    for (int64_t a = 0; a < anchors.per_cell; ++a) {
      const float* base = anchors.boxes + 4 * (l * anchors.per_cell + a) + axis;
      const float distance =
          distance_along(anchors, level, cell, base[0], base[2], point);
      if (sqrtf(product(distance, distance)) <= reach) {
        return true;
      }
    }
    return false;
  };
  while (range.begin > 0 && within(range.begin - 1)) {
    --range.begin;
  }
  while (range.end < cells && within(range.end)) {
    ++range.end;
  }
  return range;
}

// A rectangle of at least `cells` cells near the point, as square as the level
// allows, or the whole level.
DLKERNELS_SHARED_CODE Window block_around(
    const Anchors& anchors,
    const Level& level,
    int64_t cells,
    float x,
    float y) {
  int64_t side = 1;
  while (side * side < cells) {
    ++side;
  }
  int64_t height = smaller(side, level.height);
  const int64_t width = smaller((cells + height - 1) / height, level.width);
  height = smaller((cells + width - 1) / width, level.height);
  return {
      cells_around(anchors, level, level.height, y, height),
      cells_around(anchors, level, level.width, x, width)};
}

// The cells that hold the `k` nearest anchors of a grid level to the point,
// and few others; count(window) tells how many anchors of a window can be
// candidates. All of a block of k anchors lie within its reach, so the nearest
// k do, too.
template <typename Count>
DLKERNELS_SHARED_CODE Window window_around(
    const Anchors& anchors,
    int64_t l,
    int64_t k,
    float x,
    float y,
    const Count& count) {
  const Level& level = anchors.levels[l];
  int64_t cells = (k + anchors.per_cell - 1) / anchors.per_cell;
  Window block = block_around(anchors, level, cells, x, y);
  while (count(block) < k) {
    if (size_of(block.rows) == level.height &&
        size_of(block.columns) == level.width) {
      return block;
    }
    cells *= 2;
    block = block_around(anchors, level, cells, x, y);
  }
  const float reach = reach_of(anchors, l, block, x, y);
  return {
      widen(anchors, l, level.height, block.rows, 1, y, reach),
      widen(anchors, l, level.width, block.columns, 0, x, reach)};
}

// ---- candidates ---------------------------------------------------------

// A distance and a position as one number: nearer first, then lower position.
DLKERNELS_SHARED_CODE uint64_t
order_of(float squared_distance, int64_t position) {
  const float distance = sqrtf(squared_distance);
  uint32_t bits;
  memcpy(&bits, &distance, sizeof(bits));
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(position);
}

constexpr uint64_t kNothing = ~uint64_t{0};

DLKERNELS_SHARED_CODE float distance_of(uint64_t order) {
  const auto bits = static_cast<uint32_t>(order >> 32);
  float distance;
  memcpy(&distance, &bits, sizeof(distance));
  return distance;
}

DLKERNELS_SHARED_CODE int64_t position_of(uint64_t order) {
  return static_cast<int64_t>(order & 0xFFFFFFFFu);
}

// Stands for the IoU of a candidate that a level is too small to have.
constexpr float kAbsent = -1.0f;

// Mean plus unbiased standard deviation of the candidates' IoUs, in their
// order; the deviation of a single candidate is 0.
template <typename Iou>
DLKERNELS_SHARED_CODE double threshold_of(int64_t slots, const Iou& iou_of) {
  int64_t count = 0;
  double sum = 0.0;
  for (int64_t i = 0; i < slots; ++i) {
    const float iou = iou_of(i);
    if (iou != kAbsent) {
      sum += iou;
      ++count;
    }
  }
  const double mean = sum / static_cast<double>(count);
  double squares = 0.0;
  for (int64_t i = 0; i < slots; ++i) {
    const float iou = iou_of(i);
    if (iou != kAbsent) {
      const double deviation = iou - mean;
      squares += product(deviation, deviation);
    }
  }
  const int64_t freedom = count > 1 ? count - 1 : 1;
  return mean + sqrt(squares / static_cast<double>(freedom));
}

// ---- claims -------------------------------------------------------------

// A box's claim to an anchor; the largest wins: the highest IoU, then the
// lowest index. 0 is no claim.
DLKERNELS_SHARED_CODE uint64_t claim_of(float iou, int64_t box) {
  uint32_t bits;
  memcpy(&bits, &iou, sizeof(bits));
  return static_cast<uint64_t>(bits) << 32 |
         (0xFFFFFFFFu - static_cast<uint32_t>(box));
}

DLKERNELS_SHARED_CODE int64_t box_of_claim(uint64_t claim) {
  return claim == 0 ? -1
                    : static_cast<int64_t>(0xFFFFFFFFu - (claim & 0xFFFFFFFFu));
}

DLKERNELS_SHARED_CODE float iou_of_claim(uint64_t claim) {
  return distance_of(claim);
}

// ---- anchors that are no candidates -------------------------------------

enum class Exclusion : uint8_t { None, Invalid, Ignored };

constexpr int64_t kIgnored = -2;

struct Exclude {
  const bool* valid;           // [count] or [images, count], or null
  int64_t valid_image_stride;  // anchors from one image's mask to the next's
  const float* ignore_boxes;   // [images, num_ignore, 4], or null
  int64_t num_ignore;
  float ignore_iof;
};

DLKERNELS_SHARED_CODE Exclusion exclusion_of(
    const Exclude& args, int64_t image, int64_t index, const Box& anchor) {
  if (args.valid != nullptr &&
      !args.valid[image * args.valid_image_stride + index]) {
    return Exclusion::Invalid;
  }
  for (int64_t i = 0; i < args.num_ignore; ++i) {
    const Box box = box_at(args.ignore_boxes, image * args.num_ignore + i);
    if (intersection(anchor, box) / area(anchor) > args.ignore_iof) {
      return Exclusion::Ignored;
    }
  }
  return Exclusion::None;
}

// ---- the whole assignment -----------------------------------------------

struct Assign {
  Anchors anchors;
  bool grid;
  int64_t images;
  int64_t max_boxes;      // boxes of an image, padding included
  const float* boxes;     // [images, max_boxes, 4]
  const int64_t* counts;  // [images], boxes without padding
  int64_t k;              // candidates on a level, where it has as many
  int64_t slots;          // candidates of a box on all levels, at most
  Exclusion* exclusions;  // [images, count], or null: none
  uint64_t* claims;       // [images, count], zero at first
};

}  // namespace dlkernels::atss
