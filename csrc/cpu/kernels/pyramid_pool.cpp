#include "pyramid_pool.h"

#include <type_traits>

#include "../transpose.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

constexpr int64_t kReach = 2;  // of a window, to either side

// The place in its window of each lane's maximum. Compilers convert to and from
// bytes lane by lane.
typedef int16_t Places __attribute__((vector_size(2 * kVecSize)));

DLKERNELS_INLINE IntVec load_places(const int16_t* from) {
  Places places;
  __builtin_memcpy(&places, from, sizeof(places));
  return __builtin_convertvector(places, IntVec);
}

DLKERNELS_INLINE void store_places(int16_t* to, IntVec value) {
  const Places places = __builtin_convertvector(value, Places);
  __builtin_memcpy(to, &places, sizeof(places));
}

// ---- maps in memory and in scratch --------------------------------------

// The channels of an item.
template <typename T>
struct Group {
  T* data;  // first channel, first pixel
  int64_t count;
  int64_t channel_stride;
  int64_t pixel_stride;
};

// In a block of maps that have `blocks` times the channels of x.
template <typename T>
DLKERNELS_INLINE Group<T> group_of(
    const PyramidPoolArgs& args,
    T* data,
    int64_t item,
    int64_t block,
    int64_t blocks) {
  const int64_t groups = (args.channels + kVecSize - 1) / kVecSize;
  const int64_t sample = item / groups;
  const int64_t first = item % groups * kVecSize;
  const int64_t left = args.channels - first;
  const int64_t channels = blocks * args.channels;
  const int64_t channel = block * args.channels + first;
  data += sample * channels * args.area();
  data += args.channels_last ? channel : channel * args.area();
  return {data, left < kVecSize ? left : kVecSize, args.area(), channels};
}

// Calls body(values, pixel, pixels) for squares of channels and pixels, which
// it reads or writes.
template <typename Body>
DLKERNELS_INLINE void for_each_square(int64_t area, const Body& body) {
  for_each_vec(area, [&](int64_t pixel, auto pixels) {
    Vec values[kVecSize];
    body(values, pixel, pixels);
  });
}

// Scratch has the channels of a pixel side by side, and room for whole squares.
template <bool kAdd>
DLKERNELS_INLINE void put(float* to, Vec value) {
  store(to, kAdd ? load(to) + value : value);
}

template <bool kAdd, typename T>
void load_planes(const Group<const T>& group, int64_t area, float* to) {
  for_each_square(area, [&](auto& values, int64_t pixel, auto pixels) {
    for (int64_t i = 0; i < kVecSize; ++i) {
      const T* plane = group.data + i * group.channel_stride + pixel;
      values[i] = i < group.count ? load(plane, pixels) : Vec{};
    }
    transpose(values);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kVecSize; ++i) {
      put<kAdd>(to + (pixel + i) * kVecSize, values[i]);
    }
  });
}

template <bool kAdd, typename T, typename Lanes>
DLKERNELS_INLINE void load_pixels(
    const Group<const T>& group, int64_t area, float* to, Lanes lanes) {
  for (int64_t p = 0; p < area; ++p) {
    const T* from = group.data + p * group.pixel_stride;
    put<kAdd>(to + p * kVecSize, load(from, lanes));
  }
}

template <bool kAdd, typename T>
void load_group(
    const PyramidPoolArgs& args, const Group<const T>& group, float* to) {
  if (!args.channels_last) {
    load_planes<kAdd>(group, args.area(), to);
  } else if (group.count == kVecSize) {
    load_pixels<kAdd>(group, args.area(), to, Full{});
  } else {
    load_pixels<kAdd>(group, args.area(), to, group.count);
  }
}

template <typename T>
void store_planes(const float* from, int64_t area, const Group<T>& group) {
  for_each_square(area, [&](auto& values, int64_t pixel, auto pixels) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kVecSize; ++i) {
      values[i] = load(from + (pixel + i) * kVecSize);
    }
    transpose(values);
    for (int64_t i = 0; i < group.count; ++i) {
      T* plane = group.data + i * group.channel_stride + pixel;
      store(plane, values[i], pixels);
    }
  });
}

template <typename T, typename Lanes>
DLKERNELS_INLINE void store_pixels(
    const float* from, int64_t area, const Group<T>& group, Lanes lanes) {
  for (int64_t p = 0; p < area; ++p) {
    T* to = group.data + p * group.pixel_stride;
    store(to, load(from + p * kVecSize), lanes);
  }
}

template <typename T>
void store_group(
    const PyramidPoolArgs& args, const float* from, const Group<T>& group) {
  if (!args.channels_last) {
    store_planes(from, args.area(), group);
  } else if (group.count == kVecSize) {
    store_pixels(from, args.area(), group, Full{});
  } else {
    store_pixels(from, args.area(), group, group.count);
  }
}

// ---- windows along one axis ---------------------------------------------

// A window of 5 x 5 pixels is one of 5 along each axis. The first maximum of
// the first row that has the largest one is the first of the whole window.
enum class Axis { Row, Column };

// Calls body(pixel, first, last, step) for each pixel of the maps: a window
// around it begins `first` and ends `last` pixels, of `step`, from it. Those
// that lie within the maps have constants for these.
template <Axis kAxis, typename Body>
DLKERNELS_INLINE void for_each_window(
    int64_t height, int64_t width, const Body& body) {
  const int64_t size = kAxis == Axis::Row ? width : height;
  const int64_t step = kAxis == Axis::Row ? 1 : width;
  const auto visit = [&](int64_t pixel, int64_t position) {
    const int64_t before = position, after = size - 1 - position;
    if (before >= kReach && after >= kReach) {
      body(pixel, -kReach, kReach, step);
    } else {
      body(
          pixel,
          before < kReach ? -before : -kReach,
          after < kReach ? after : kReach,
          step);
    }
  };
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      visit(y * width + x, kAxis == Axis::Row ? x : y);
    }
  }
}

template <Axis kAxis>
void pool(const PyramidPoolArgs& args, const float* from, float* to) {
  for_each_window<kAxis>(
      args.height,
      args.width,
      [&](int64_t pixel, int64_t first, int64_t last, int64_t step) {
        const float* centre = from + pixel * kVecSize;
        Vec best = load(centre + first * step * kVecSize);
        for (int64_t tap = first + 1; tap <= last; ++tap) {
          best = maximum(load(centre + tap * step * kVecSize), best);
        }
        store(to + pixel * kVecSize, best);
      });
}

// The same; and the place of the maximum in its window, from 0 to 4.
template <Axis kAxis>
void pool_with_places(
    const PyramidPoolArgs& args,
    const float* from,
    float* to,
    int16_t* places) {
  for_each_window<kAxis>(
      args.height,
      args.width,
      [&](int64_t pixel, int64_t first, int64_t last, int64_t step) {
        const float* centre = from + pixel * kVecSize;
        Vec best = load(centre + first * step * kVecSize);
        IntVec place = IntVec{} + static_cast<int32_t>(first + kReach);
        for (int64_t tap = first + 1; tap <= last; ++tap) {
          const Vec value = load(centre + tap * step * kVecSize);
          const IntVec better = (value > best) | (value != value);
          best = better ? value : best;
          place =
              better ? IntVec{} + static_cast<int32_t>(tap + kReach) : place;
        }
        store(to + pixel * kVecSize, best);
        store_places(places + pixel * kVecSize, place);
      });
}

// Each pixel gathers the gradients of the windows whose maximum it is.
template <Axis kAxis>
void pool_backward(
    const PyramidPoolArgs& args,
    const float* grad,
    const int16_t* places,
    float* to) {
  for_each_window<kAxis>(
      args.height,
      args.width,
      [&](int64_t pixel, int64_t first, int64_t last, int64_t step) {
        Vec total{};
        for (int64_t tap = first; tap <= last; ++tap) {
          const int64_t window = (pixel + tap * step) * kVecSize;
          const IntVec is_mine = load_places(places + window) ==
                                 static_cast<int32_t>(kReach - tap);
          total += is_mine ? load(grad + window) : Vec{};
        }
        store(to + pixel * kVecSize, total);
      });
}

// ---- the cascade --------------------------------------------------------

// Floats of a group's map.
int64_t map_floats(const PyramidPoolArgs& args) {
  const int64_t squares = (args.area() + kVecSize - 1) / kVecSize;
  return squares * kVecSize * kVecSize;
}

int64_t forward_floats(const PyramidPoolArgs& args) {
  return 2 * map_floats(args);
}

int64_t backward_floats(const PyramidPoolArgs& args) {
  // Two maps, and places of half their size for both axes of every stage.
  return (2 + kPoolStages) * map_floats(args);
}

template <typename T>
void forward_item(const PyramidPoolArgs& args, float* map, int64_t item) {
  const auto block = [&](int64_t index) {
    T* out = static_cast<T*>(args.result);
    return group_of(args, out, item, index, kPoolBlocks);
  };
  float* other = map + map_floats(args);
  const T* x = static_cast<const T*>(args.x);
  load_group<false>(args, group_of(args, x, item, 0, 1), map);
  store_group(args, map, block(kPoolStages));
  for (int64_t stage = 0; stage < kPoolStages; ++stage) {
    pool<Axis::Row>(args, map, other);
    pool<Axis::Column>(args, other, map);
    store_group(args, map, block(kPoolStages - 1 - stage));
  }
}

template <typename T>
void backward_item(const PyramidPoolArgs& args, float* map, int64_t item) {
  const int64_t floats = map_floats(args);
  float* other = map + floats;
  int16_t* places = reinterpret_cast<int16_t*>(other + floats);
  const T* x = static_cast<const T*>(args.x);
  load_group<false>(args, group_of(args, x, item, 0, 1), map);
  for (int64_t stage = 0; stage < kPoolStages; ++stage) {
    int16_t* in_rows = places + 2 * stage * floats;
    pool_with_places<Axis::Row>(args, map, other, in_rows);
    pool_with_places<Axis::Column>(args, other, map, in_rows + floats);
  }
  const auto block = [&](int64_t index) {
    const T* grad_out = static_cast<const T*>(args.grad_out);
    return group_of(args, grad_out, item, index, kPoolBlocks);
  };
  load_group<false>(args, block(0), map);
  for (int64_t stage = kPoolStages - 1; stage >= 0; --stage) {
    const int16_t* in_rows = places + 2 * stage * floats;
    pool_backward<Axis::Column>(args, map, in_rows + floats, other);
    pool_backward<Axis::Row>(args, other, in_rows, map);
    load_group<true>(args, block(kPoolStages - stage), map);
  }
  T* grad_x = static_cast<T*>(args.result);
  store_group(args, map, group_of(args, grad_x, item, 0, 1));
}

void forward(
    const PyramidPoolArgs& args, float* scratch, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t item = begin; item < end; ++item) {
      forward_item<T>(args, scratch, item);
    }
  });
}

void backward(
    const PyramidPoolArgs& args, float* scratch, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t item = begin; item < end; ++item) {
      backward_item<T>(args, scratch, item);
    }
  });
}

}  // namespace

extern const PyramidPoolKernels pyramid_pool_kernels = {
    kVecSize,
    forward_floats,
    backward_floats,
    forward,
    backward,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
