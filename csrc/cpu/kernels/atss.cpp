// Every instruction set gives the same bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "atss.h"

#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

using namespace atss;

// ---- the k smallest orders ----------------------------------------------

// A heap with its largest order on top, which the next smaller one replaces.
class Nearest {
 public:
  Nearest(uint64_t* orders, int64_t size) : orders_(orders), size_(size) {
    for (int64_t i = 0; i < size; ++i) {
      orders_[i] = kNothing;
    }
  }

  // Squared distances above this are too far. Exactly which are near enough is
  // decided by their orders: the square of a root may lie a bit below.
  float bound() const {
    return bound_;
  }

  void offer(float squared_distance, int64_t position) {
    const uint64_t order = order_of(squared_distance, position);
    if (order < orders_[0]) {
      orders_[0] = order;
      sink(size_);
      update_bound();
    }
  }

  void sort() {
    for (int64_t last = size_ - 1; last > 0; --last) {
      const uint64_t largest = orders_[0];
      orders_[0] = orders_[last];
      orders_[last] = largest;
      sink(last);
    }
  }

 private:
  void sink(int64_t size) {
    const uint64_t order = orders_[0];
    int64_t hole = 0;
    for (int64_t child = 1; child < size; child = 2 * hole + 1) {
      child += child + 1 < size && orders_[child + 1] > orders_[child];
      if (orders_[child] <= order) {
        break;
      }
      orders_[hole] = orders_[child];
      hole = child;
    }
    orders_[hole] = order;
  }

  void update_bound() {
    if (orders_[0] != kNothing) {
      const auto bits = static_cast<uint32_t>(orders_[0] >> 32);
      float distance;
      __builtin_memcpy(&distance, &bits, sizeof(distance));
      bound_ = distance * distance * 1.000001f + 1e-37f;
    }
  }

  uint64_t* orders_;
  int64_t size_;
  float bound_ = INFINITY;
};

// ---- search -------------------------------------------------------------

struct Search {
  const Assign& args;
  const AtssCentres& centres;
  int64_t image;
  int64_t level;
  float x;
  float y;

  bool excluded(int64_t position) const {
    return args.exclusions != nullptr &&
           args.exclusions
                   [image * args.anchors.count +
                    args.anchors.levels[level].first + position] !=
               Exclusion::None;
  }
};

// Visits every anchor of the level in order.
void search_all(const Search& search, Nearest& nearest) {
  const Level& level = search.args.anchors.levels[search.level];
  const int64_t first =
      search.image * search.centres.image_stride + level.first;
  const float* xs = search.centres.x + first;
  const float* ys = search.centres.y + first;
  const Vec x = broadcast(search.x);
  const Vec y = broadcast(search.y);
  for_each_vec(level.count, [&](int64_t i, auto lanes) {
    const Vec dx = load(xs + i, lanes) - x;
    const Vec dy = load(ys + i, lanes) - y;
    const Vec squared = dx * dx + dy * dy;
    if (any(squared <= nearest.bound())) {
      for (int64_t lane = 0; lane < count_of(lanes); ++lane) {
        if (squared[lane] <= nearest.bound() && !search.excluded(i + lane)) {
          nearest.offer(squared[lane], i + lane);
        }
      }
    }
  });
}

// Visits the anchors of the cells that can hold the nearest, in order.
void search_grid(const Search& search, int64_t k, Nearest& nearest) {
  const Anchors& anchors = search.args.anchors;
  const Level& level = anchors.levels[search.level];
  const auto for_each_anchor = [&](const Window& window, const auto& body) {
    for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
      for (int64_t column = window.columns.begin; column < window.columns.end;
           ++column) {
        const int64_t cell = row * level.width + column;
        for (int64_t a = 0; a < anchors.per_cell; ++a) {
          const int64_t position = cell * anchors.per_cell + a;
          if (!search.excluded(position)) {
            body(position, row, column, a);
          }
        }
      }
    }
  };
  const auto count = [&](const Window& window) {
    if (search.args.exclusions == nullptr) {
      return size_of(window.rows) * size_of(window.columns) * anchors.per_cell;
    }
    int64_t usable = 0;
    for_each_anchor(
        window, [&](int64_t, int64_t, int64_t, int64_t) { ++usable; });
    return usable;
  };
  const Window window =
      window_around(anchors, search.level, k, search.x, search.y, count);
  for_each_anchor(
      window, [&](int64_t position, int64_t row, int64_t column, int64_t a) {
        const Box base =
            box_at(anchors.boxes, search.level * anchors.per_cell + a);
        const float x = cell_centre(anchors, level, column);
        const float y = cell_centre(anchors, level, row);
        const float squared = squared_distance(
            centre(x + base.x1, x + base.x2),
            centre(y + base.y1, y + base.y2),
            search.x,
            search.y);
        if (squared <= nearest.bound()) {
          nearest.offer(squared, position);
        }
      });
}

// ---- steps --------------------------------------------------------------

template <bool kGrid>
void exclude_anchors(
    const Assign& args, const Exclude& exclude, int64_t begin, int64_t end) {
  const Anchors& anchors = args.anchors;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / anchors.count;
    const int64_t index = item % anchors.count;
    const int64_t l = level_of(anchors, index);
    const Box anchor =
        anchor_at<kGrid>(anchors, image, l, index - anchors.levels[l].first);
    args.exclusions[item] = exclusion_of(exclude, image, index, anchor);
  }
}

void exclude(
    const Assign& args, const Exclude& exclude, int64_t begin, int64_t end) {
  args.grid ? exclude_anchors<true>(args, exclude, begin, end)
            : exclude_anchors<false>(args, exclude, begin, end);
}

void centres(
    const float* boxes, float* x, float* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Box box = box_at(boxes, i);
    x[i] = centre(box.x1, box.x2);
    y[i] = centre(box.y1, box.y2);
  }
}

void raise(uint64_t* claim, uint64_t value) {
  uint64_t current = __atomic_load_n(claim, __ATOMIC_RELAXED);
  while (
      current < value &&
      !__atomic_compare_exchange_n(
          claim, &current, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <bool kGrid>
void claim_anchors(
    const Assign& args,
    const AtssCentres& centres,
    const AtssBox& item,
    uint64_t* orders,
    Candidate* candidates) {
  const Anchors& anchors = args.anchors;
  const Box box = box_at(args.boxes, item.image * args.max_boxes + item.box);
  if (!is_proper(box)) {
    return;
  }
  int64_t slots = 0;
  for (int64_t l = 0; l < anchors.num_levels; ++l) {
    const Level& level = anchors.levels[l];
    const int64_t k = smaller(args.k, level.count);
    if (k == 0) {
      continue;
    }
    const Search search{
        args,
        centres,
        item.image,
        l,
        centre(box.x1, box.x2),
        centre(box.y1, box.y2)};
    Nearest nearest(orders, k);
    if constexpr (kGrid) {
      search_grid(search, k, nearest);
    } else {
      search_all(search, nearest);
    }
    nearest.sort();
    for (int64_t i = 0; i < k && orders[i] != kNothing; ++i) {
      const int64_t position = position_of(orders[i]);
      candidates[slots++] = candidate_of(
          level.first + position,
          anchor_at<kGrid>(anchors, item.image, l, position),
          box);
    }
  }
  const double threshold = threshold_of(candidates, slots);
  for (int64_t i = 0; i < slots; ++i) {
    const Candidate& candidate = candidates[i];
    if (candidate.iou >= threshold && candidate.centre_inside) {
      raise(
          args.claims + item.image * anchors.count + candidate.anchor,
          claim_of(candidate.iou, item.box));
    }
  }
}

void claim(
    const Assign& args,
    const AtssCentres& centres,
    const AtssBox* boxes,
    uint64_t* orders,
    Candidate* candidates,
    int64_t begin,
    int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.grid
        ? claim_anchors<true>(args, centres, boxes[i], orders, candidates)
        : claim_anchors<false>(args, centres, boxes[i], orders, candidates);
  }
}

void resolve(
    const Assign& args,
    int64_t* assigned,
    float* iou,
    int64_t begin,
    int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t claim = args.claims[i];
    const bool ignored =
        args.exclusions != nullptr && args.exclusions[i] == Exclusion::Ignored;
    assigned[i] = ignored ? kIgnored : box_of_claim(claim);
    iou[i] = iou_of_claim(claim);
  }
}

}  // namespace

extern const AtssKernels atss_kernels = {
    exclude,
    centres,
    claim,
    resolve,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
