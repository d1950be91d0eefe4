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

// ---- the k nearest of few anchors ---------------------------------------

// A squared distance may be a bit above this square, and its root no larger
// than the distance.
float bound_of(float squared) {
  return squared * 1.000001f + 1e-37f;
}

// Anchors in the order of their positions, so few that each is compared with
// every other: that takes no branches.
struct Few {
  static constexpr int64_t kCapacity = 256;

  float squared[kCapacity];
  uint32_t positions[kCapacity];
  int64_t size = 0;

  bool is_full() const {
    return size == kCapacity;
  }

  void add(float squared_distance, int64_t position) {
    squared[size] = squared_distance;
    positions[size] = static_cast<uint32_t>(position);
    ++size;
  }
};

DLKERNELS_INLINE IntVec lanes_from(int64_t first) {
  IntVec lanes;
  for (int64_t i = 0; i < kVecSize; ++i) {
    lanes[i] = static_cast<int32_t>(first + i);
  }
  return lanes;
}

// Writes the positions of the k nearest in order; returns how many there are.
int64_t rank(Few& few, int64_t k, uint64_t* nearest) {
  float distances[Few::kCapacity];
  int32_t order[Few::kCapacity];
  for (int64_t i = few.size; i % kVecSize != 0; ++i) {
    few.squared[i] = INFINITY;
  }
  for (int64_t i = 0; i < few.size; i += kVecSize) {
    store(distances + i, sqrt(load(few.squared + i)));
  }
  for (int64_t i = 0; i < few.size; i += kVecSize) {
    const Vec distance = load(distances + i);
    const IntVec lanes = lanes_from(i);
    IntVec before{};
    for (int64_t j = 0; j < few.size; ++j) {
      const Vec other = broadcast(distances[j]);
      const IntVec earlier = static_cast<int32_t>(j) < lanes;
      before -= (other < distance) | ((other == distance) & earlier);
    }
    const int64_t count = smaller(kVecSize, few.size - i);
    for (int64_t lane = 0; lane < count; ++lane) {
      order[before[lane]] = static_cast<int32_t>(i + lane);
    }
  }
  const int64_t found = smaller(k, few.size);
  for (int64_t i = 0; i < found; ++i) {
    nearest[i] = few.positions[order[i]];
  }
  return found;
}

// ---- the k nearest of any number ----------------------------------------

// A heap with its largest order on top, which the next smaller one replaces.
class Heap {
 public:
  Heap(uint64_t* orders, int64_t size) : orders_(orders), size_(size) {
    for (int64_t i = 0; i < size; ++i) {
      orders_[i] = kNothing;
    }
  }

  // Squared distances above this are too far.
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

  // Leaves the positions in order; returns how many there are.
  int64_t finish() {
    for (int64_t last = size_ - 1; last > 0; --last) {
      const uint64_t largest = orders_[0];
      orders_[0] = orders_[last];
      orders_[last] = largest;
      sink(last);
    }
    int64_t found = 0;
    for (; found < size_ && orders_[found] != kNothing; ++found) {
      orders_[found] = static_cast<uint64_t>(position_of(orders_[found]));
    }
    return found;
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
      const float distance = distance_of(orders_[0]);
      bound_ = bound_of(distance * distance);
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

// The squared distances of arbitrary anchors, NaN where one is excluded.
struct Scan {
  const float* xs;
  const float* ys;
  float x;
  float y;
};

template <typename Lanes>
DLKERNELS_INLINE Vec squares_at(const Scan& scan, int64_t i, Lanes lanes) {
  return squared_distance(
      load(scan.xs + i, lanes),
      load(scan.ys + i, lanes),
      broadcast(scan.x),
      broadcast(scan.y));
}

// The nearest of each of 64 groups of anchors: their k-th nearest is at least
// as far as the k-th nearest of all.
constexpr int64_t kGroups = 64;

float bound_by_groups(const Scan& scan, int64_t count, int64_t k) {
  constexpr int64_t kVecs = kGroups / kVecSize;
  Vec least[kVecs];
  for (Vec& value : least) {
    value = broadcast(INFINITY);
  }
  int64_t i = 0;
  for (; i + kGroups <= count; i += kGroups) {
    for (int64_t v = 0; v < kVecs; ++v) {
      least[v] = smaller(squares_at(scan, i + v * kVecSize, Full{}), least[v]);
    }
  }
  float groups[kGroups];
  for (int64_t v = 0; v < kVecs; ++v) {
    store(groups + v * kVecSize, least[v]);
  }
  for (int64_t group = 0; i < count; ++i, ++group) {
    const float squared =
        squared_distance(scan.xs[i], scan.ys[i], scan.x, scan.y);
    groups[group] = smaller(squared, groups[group]);
  }
  // The k-th nearest is the farthest that fewer than k are nearer than.
  Vec farthest{};
  for (int64_t v = 0; v < kGroups; v += kVecSize) {
    const Vec value = load(groups + v);
    IntVec nearer{};
    for (int64_t j = 0; j < kGroups; ++j) {
      nearer -= broadcast(groups[j]) < value;
    }
    farthest =
        larger(nearer < static_cast<int32_t>(k) ? value : Vec{}, farthest);
  }
  float bound = 0.0f;
  for (int64_t lane = 0; lane < kVecSize; ++lane) {
    bound = larger(bound, farthest[lane]);
  }
  return bound_of(bound);
}

// Calls body(squared distance, position), in order, for each anchor whose
// squared distance is at most bound(), while it returns true.
template <typename Bound, typename Body>
DLKERNELS_INLINE bool for_each_within(
    const Scan& scan, int64_t count, const Bound& bound, const Body& body) {
  for (int64_t i = 0; i < count; i += kVecSize) {
    const int64_t lanes = smaller(kVecSize, count - i);
    const Vec squared = lanes == kVecSize ? squares_at(scan, i, Full{})
                                          : squares_at(scan, i, lanes);
    if (any(squared <= bound())) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (squared[lane] <= bound() && !body(squared[lane], i + lane)) {
          return false;
        }
      }
    }
  }
  return true;
}

// The k nearest of all anchors of the level, in order of distance.
int64_t search_all(const Search& search, int64_t k, uint64_t* nearest) {
  const Level& level = search.args.anchors.levels[search.level];
  const int64_t first =
      search.image * search.centres.image_stride + level.first;
  const Scan scan{
      search.centres.x + first, search.centres.y + first, search.x, search.y};
  if (k <= kGroups) {
    const float bound = bound_by_groups(scan, level.count, k);
    Few few;
    const bool fits = for_each_within(
        scan,
        level.count,
        [&] { return bound; },
        [&](float squared, int64_t position) {
          const bool has_room = !few.is_full();
          if (has_room) {
            few.add(squared, position);
          }
          return has_room;
        });
    if (fits) {
      return rank(few, k, nearest);
    }
  }
  Heap heap(nearest, k);
  for_each_within(
      scan,
      level.count,
      [&] { return heap.bound(); },
      [&](float squared, int64_t position) {
        heap.offer(squared, position);
        return true;
      });
  return heap.finish();
}

// Calls body(position, row, column, base anchor), in order, for each anchor of
// the window that is not excluded.
template <typename Body>
DLKERNELS_INLINE void for_each_anchor(
    const Search& search, const Window& window, const Body& body) {
  const Anchors& anchors = search.args.anchors;
  const Level& level = anchors.levels[search.level];
  for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
    int64_t position =
        (row * level.width + window.columns.begin) * anchors.per_cell;
    for (int64_t column = window.columns.begin; column < window.columns.end;
         ++column) {
      for (int64_t a = 0; a < anchors.per_cell; ++a, ++position) {
        if (!search.excluded(position)) {
          body(position, row, column, a);
        }
      }
    }
  }
}

// The k nearest anchors of the level, among the cells that can hold them.
int64_t search_grid(const Search& search, int64_t k, uint64_t* nearest) {
  const Anchors& anchors = search.args.anchors;
  const Level& level = anchors.levels[search.level];
  const auto size = [&](const Window& window) {
    return size_of(window.rows) * size_of(window.columns) * anchors.per_cell;
  };
  const auto count = [&](const Window& window) {
    if (search.args.exclusions == nullptr) {
      return size(window);
    }
    int64_t usable = 0;
    for_each_anchor(
        search, window, [&](int64_t, int64_t, int64_t, int64_t) { ++usable; });
    return usable;
  };
  const Window window =
      window_around(anchors, search.level, k, search.x, search.y, count);
  const auto offset_along = [&](int64_t cell, int64_t a, int axis, float to) {
    const float* base =
        anchors.boxes + 4 * (search.level * anchors.per_cell + a) + axis;
    return distance_along(anchors, level, cell, base[0], base[2], to);
  };

  if (size(window) > Few::kCapacity) {
    Heap heap(nearest, k);
    for_each_anchor(
        search,
        window,
        [&](int64_t position, int64_t row, int64_t column, int64_t a) {
          const float dx = offset_along(column, a, 0, search.x);
          const float dy = offset_along(row, a, 1, search.y);
          const float squared = product(dx, dx) + product(dy, dy);
          if (squared <= heap.bound()) {
            heap.offer(squared, position);
          }
        });
    return heap.finish();
  }

  // Rows share the squares across, and columns those down.
  float across[Few::kCapacity];
  float down[Few::kCapacity];
  const auto squares = [&](Range cells, int axis, float to, float* out) {
    for (int64_t cell = cells.begin; cell < cells.end; ++cell) {
      for (int64_t a = 0; a < anchors.per_cell; ++a) {
        const float offset = offset_along(cell, a, axis, to);
        *out++ = product(offset, offset);
      }
    }
  };
  squares(window.columns, 0, search.x, across);
  squares(window.rows, 1, search.y, down);
  Few few;
  for_each_anchor(
      search,
      window,
      [&](int64_t position, int64_t row, int64_t column, int64_t a) {
        const int64_t i =
            (column - window.columns.begin) * anchors.per_cell + a;
        const int64_t j = (row - window.rows.begin) * anchors.per_cell + a;
        const float squared = across[i] + down[j];
        if (squared == squared) {  // ranks need numbers
          few.add(squared, position);
        }
      });
  return rank(few, k, nearest);
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
    const Assign& args, const AtssCentres& out, int64_t begin, int64_t end) {
  const Anchors& anchors = args.anchors;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / anchors.count;
    const Box box =
        box_at(anchors.boxes + image * anchors.image_stride, i % anchors.count);
    const bool excluded =
        args.exclusions != nullptr && args.exclusions[i] != Exclusion::None;
    out.x[i] = excluded ? NAN : centre(box.x1, box.x2);
    out.y[i] = centre(box.y1, box.y2);
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

// Finds the candidates of the box and their boxes; returns how many.
template <bool kGrid>
int64_t find_candidates(
    const Assign& args,
    const AtssCentres& centres,
    int64_t image,
    const Box& box,
    const AtssWorkspace& work) {
  const Anchors& anchors = args.anchors;
  int64_t slots = 0;
  for (int64_t l = 0; l < anchors.num_levels; ++l) {
    const int64_t k = smaller(args.k, anchors.levels[l].count);
    if (k == 0) {
      continue;
    }
    const Search search{
        args,
        centres,
        image,
        l,
        centre(box.x1, box.x2),
        centre(box.y1, box.y2)};
    const int64_t found = kGrid ? search_grid(search, k, work.orders)
                                : search_all(search, k, work.orders);
    for (int64_t i = 0; i < found; ++i, ++slots) {
      const auto position = static_cast<int64_t>(work.orders[i]);
      const Box anchor = anchor_at<kGrid>(anchors, image, l, position);
      work.anchors[slots] = anchors.levels[l].first + position;
      work.boxes[slots] = anchor.x1;
      work.boxes[work.capacity + slots] = anchor.y1;
      work.boxes[2 * work.capacity + slots] = anchor.x2;
      work.boxes[3 * work.capacity + slots] = anchor.y2;
    }
  }
  return slots;
}

void measure_candidates(
    const Box& box, int64_t slots, const AtssWorkspace& work) {
  const BoxOf<Vec> target{
      broadcast(box.x1),
      broadcast(box.y1),
      broadcast(box.x2),
      broadcast(box.y2)};
  for (int64_t i = 0; i < slots; i += kVecSize) {
    const BoxOf<Vec> anchor{
        load(work.boxes + i),
        load(work.boxes + work.capacity + i),
        load(work.boxes + 2 * work.capacity + i),
        load(work.boxes + 3 * work.capacity + i)};
    const Vec value = iou(anchor, target);
    store(work.iou + i, value);
    store(work.iou_if_inside + i, if_centre_inside(anchor, target, value));
  }
}

template <bool kGrid>
void claim_anchors(
    const Assign& args,
    const AtssCentres& centres,
    const AtssBox& item,
    const AtssWorkspace& work) {
  const Box box = box_at(args.boxes, item.image * args.max_boxes + item.box);
  if (!is_proper(box)) {
    return;
  }
  const int64_t slots =
      find_candidates<kGrid>(args, centres, item.image, box, work);
  measure_candidates(box, slots, work);
  const double threshold =
      threshold_of(slots, [&](int64_t i) { return work.iou[i]; });
  uint64_t* claims = args.claims + item.image * args.anchors.count;
  for (int64_t i = 0; i < slots; ++i) {
    if (work.iou_if_inside[i] >= threshold) {
      raise(claims + work.anchors[i], claim_of(work.iou[i], item.box));
    }
  }
}

void claim(
    const Assign& args,
    const AtssCentres& centres,
    const AtssBox* boxes,
    const AtssWorkspace& work,
    int64_t begin,
    int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.grid ? claim_anchors<true>(args, centres, boxes[i], work)
              : claim_anchors<false>(args, centres, boxes[i], work);
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
