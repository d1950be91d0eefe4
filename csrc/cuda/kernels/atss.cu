#include "atss.h"

#include "../launch.h"

// A block of threads finds the candidates of one box: each thread looks after
// every kThreads-th anchor of the window that can hold the nearest (of
// arbitrary anchors: the whole level) and remembers the nearest of its own.
// Round by round the block takes the nearest of all, and its thread looks for
// the next. Claims to anchors are integers, of which the largest stays, so no
// result depends on which block came first.

namespace dlkernels::cuda {
namespace {

using namespace atss;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

int64_t ceil_div(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// ---- the nearest anchor of a block's threads ----------------------------

__device__ uint64_t warp_least(uint64_t order) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const auto high = static_cast<uint32_t>(order >> 32);
    const auto low = static_cast<uint32_t>(order);
    const uint64_t other =
        static_cast<uint64_t>(__shfl_xor_sync(0xFFFFFFFFu, high, offset))
            << 32 |
        __shfl_xor_sync(0xFFFFFFFFu, low, offset);
    order = other < order ? other : order;
  }
  return order;
}

// The least of the block, in every thread. `shared` has kWarps elements, which
// nobody may write again before the next barrier.
__device__ uint64_t block_least(uint64_t order, uint64_t* shared) {
  order = warp_least(order);
  if (threadIdx.x % kWarpSize == 0) {
    shared[threadIdx.x / kWarpSize] = order;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    order = shared[warp] < order ? shared[warp] : order;
  }
  return order;
}

// ---- search -------------------------------------------------------------

template <bool kGrid>
struct Search {
  const Assign& args;
  int64_t image;
  int64_t level;
  float x;
  float y;
  Window window;

  __device__ bool excluded(int64_t position) const {
    return args.exclusions != nullptr &&
           args.exclusions
                   [image * args.anchors.count +
                    args.anchors.levels[level].first + position] !=
               Exclusion::None;
  }

  // The position on the level of anchor `i` of the window.
  __device__ int64_t position_of(int64_t i) const {
    if constexpr (!kGrid) {
      return i;
    } else {
      const int64_t per_cell = args.anchors.per_cell;
      const int64_t per_row = size_of(window.columns) * per_cell;
      const int64_t row = window.rows.begin + i / per_row;
      const int64_t first =
          row * args.anchors.levels[level].width + window.columns.begin;
      return first * per_cell + i % per_row;
    }
  }

  __device__ int64_t size() const {
    return size_of(window.rows) * size_of(window.columns) *
           args.anchors.per_cell;
  }

  // The nearest anchor of this thread behind the order `last`.
  __device__ uint64_t next(uint64_t last, bool first) const {
    uint64_t best = kNothing;
    for (int64_t i = threadIdx.x; i < size(); i += kThreads) {
      const int64_t position = position_of(i);
      const Box anchor = anchor_at<kGrid>(args.anchors, image, level, position);
      const float squared = squared_distance(
          centre(anchor.x1, anchor.x2), centre(anchor.y1, anchor.y2), x, y);
      const uint64_t order = order_of(squared, position);
      const bool behind = first || order > last;
      // A distance of NaN is none.
      if (squared == squared && behind && order < best && !excluded(position)) {
        best = order;
      }
    }
    return best;
  }
};

template <bool kGrid>
__device__ Window window_of(
    const Assign& args, int64_t image, int64_t l, int64_t k, float x, float y) {
  const Level& level = args.anchors.levels[l];
  if constexpr (!kGrid) {
    return {{0, 1}, {0, level.count}};
  } else {
    return window_around(args.anchors, l, k, x, y, [&](const Window& window) {
      const Search<true> search{args, image, l, x, y, window};
      if (args.exclusions == nullptr) {
        return search.size();
      }
      int64_t usable = 0;
      for (int64_t i = 0; i < search.size(); ++i) {
        usable += !search.excluded(search.position_of(i));
      }
      return usable;
    });
  }
}

// ---- kernels ------------------------------------------------------------

// A thread per anchor of each image.
template <bool kGrid>
__global__ void exclude_kernel(Assign args, Exclude exclude) {
  const Anchors& anchors = args.anchors;
  const int64_t item =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= args.images * anchors.count) {
    return;
  }
  const int64_t image = item / anchors.count;
  const int64_t index = item % anchors.count;
  const int64_t l = level_of(anchors, index);
  const Box anchor =
      anchor_at<kGrid>(anchors, image, l, index - anchors.levels[l].first);
  args.exclusions[item] = exclusion_of(exclude, image, index, anchor);
}

// A block per box, padding included.
template <bool kGrid>
__global__ void claim_kernel(Assign args, AtssCandidate* workspace) {
  DLKERNELS_SHARED(uint64_t, least, 2 * kWarps);
  DLKERNELS_SHARED(double, threshold, 1);
  const Anchors& anchors = args.anchors;
  const int64_t image = blockIdx.x / args.max_boxes;
  const int64_t index = blockIdx.x % args.max_boxes;
  if (index >= args.counts[image]) {
    return;
  }
  const Box box = box_at(args.boxes, blockIdx.x);
  if (!is_proper(box)) {
    return;
  }

  AtssCandidate* candidates = workspace + blockIdx.x * args.slots;
  const float x = centre(box.x1, box.x2);
  const float y = centre(box.y1, box.y2);
  int64_t slot = 0;
  for (int64_t l = 0; l < anchors.num_levels; ++l) {
    const int64_t k = smaller(args.k, anchors.levels[l].count);
    if (k == 0) {
      continue;
    }
    const Search<kGrid> search{
        args, image, l, x, y, window_of<kGrid>(args, image, l, k, x, y)};
    uint64_t mine = search.next(0, true);
    for (int64_t i = 0; i < k; ++i, ++slot) {
      const uint64_t nearest = block_least(mine, least + slot % 2 * kWarps);
      if (nearest == kNothing) {
        if (threadIdx.x == 0) {
          candidates[slot] = {0, kAbsent, kAbsent};
        }
      } else if (nearest == mine) {
        const int64_t position = atss::position_of(nearest);
        const Box anchor = anchor_at<kGrid>(anchors, image, l, position);
        const float value = iou(anchor, box);
        candidates[slot] = {
            anchors.levels[l].first + position,
            value,
            if_centre_inside(anchor, box, value)};
        mine = search.next(nearest, false);
      }
    }
  }

  __syncthreads();
  if (threadIdx.x == 0) {
    *threshold =
        threshold_of(args.slots, [&](int64_t i) { return candidates[i].iou; });
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < args.slots; i += kThreads) {
    const AtssCandidate candidate = candidates[i];
    if (candidate.iou_if_inside >= *threshold) {
      raise_to(
          args.claims + image * anchors.count + candidate.anchor,
          claim_of(candidate.iou, index));
    }
  }
}

// A thread per anchor of each image.
__global__ void resolve_kernel(Assign args, int64_t* assigned, float* iou) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.images * args.anchors.count) {
    return;
  }
  const uint64_t claim = args.claims[i];
  const bool ignored =
      args.exclusions != nullptr && args.exclusions[i] == Exclusion::Ignored;
  assigned[i] = ignored ? kIgnored : box_of_claim(claim);
  iou[i] = iou_of_claim(claim);
}

template <bool kGrid>
void run(const AtssAssign& args, Stream stream) {
  const Assign& assign = args.assign;
  const int64_t blocks =
      ceil_div(assign.images * assign.anchors.count, kThreads);
  if (assign.exclusions != nullptr) {
    launch(
        exclude_kernel<kGrid>, blocks, kThreads, stream, assign, args.exclude);
  }
  launch(
      claim_kernel<kGrid>,
      assign.images * assign.max_boxes,
      kThreads,
      stream,
      assign,
      args.candidates);
  launch(
      resolve_kernel,
      blocks,
      kThreads,
      stream,
      assign,
      args.assigned,
      args.iou);
}

}  // namespace

void atss_assign(const AtssAssign& args, Stream stream) {
  args.assign.grid ? run<true>(args, stream) : run<false>(args, stream);
}

}  // namespace dlkernels::cuda
