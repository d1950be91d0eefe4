#pragma once

// Counts the bytes that kernels ask of global memory. The compiler calls these
// functions before each access: they are the interface of
// KernelAddressSanitizer, which comes without a runtime of its own.

#include <cstdint>
#include <cstdio>

// The functions of this file must not be counted themselves, nor call any that
// are: no containers here.
#define DLKERNELS_UNCOUNTED __attribute__((no_sanitize("kernel-address"), used))

namespace cuda_on_cpu {

struct Traffic {
  int64_t loaded = 0;
  int64_t stored = 0;
};

struct Range {
  uintptr_t first;
  size_t bytes;  // 0: free
};

constexpr int kRanges = 256;
constexpr uintptr_t kSector = 32;
inline Traffic traffic;
inline Range ranges[kRanges];

// Sectors that the running block has touched: an open hash table whose entries
// are valid where they carry the number of the block.
struct Touched {
  static constexpr uint64_t kSlots = 1 << 20;

  uintptr_t sectors[kSlots];
  uint64_t blocks[kSlots];
  uint64_t block = 0;

  DLKERNELS_UNCOUNTED bool insert(uintptr_t sector) {
    for (uint64_t probe = 0; probe < kSlots; ++probe) {
      const uint64_t slot = (sector * 0x9E3779B97F4A7C15u + probe) % kSlots;
      if (blocks[slot] != block) {
        blocks[slot] = block;
        sectors[slot] = sector;
        return true;
      }
      if (sectors[slot] == sector) {
        return false;
      }
    }
    __builtin_trap();
  }
};

inline Touched loads;
inline Touched stores;

DLKERNELS_UNCOUNTED inline void count_next_block() {
  ++loads.block;
  ++stores.block;
}

DLKERNELS_UNCOUNTED inline void count(
    Touched& touched, int64_t& counter, const void* address, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t sector = first / kSector; sector * kSector < first + bytes;
       ++sector) {
    counter += touched.insert(sector) ? kSector : 0;
  }
}

// Accesses to these bytes are counted from now on.
DLKERNELS_UNCOUNTED inline void count_accesses(void* first, size_t bytes) {
  for (Range& range : ranges) {
    if (range.bytes == 0) {
      range = {reinterpret_cast<uintptr_t>(first), bytes};
      return;
    }
  }
  __builtin_trap();
}

DLKERNELS_UNCOUNTED inline void stop_counting(void* first) {
  for (Range& range : ranges) {
    if (range.first == reinterpret_cast<uintptr_t>(first)) {
      range = {};
    }
  }
}

DLKERNELS_UNCOUNTED inline bool is_counted(const void* address) {
  for (const Range& range : ranges) {
    if (reinterpret_cast<uintptr_t>(address) - range.first < range.bytes) {
      return true;
    }
  }
  return false;
}

// One line for each launch: bytes loaded and stored.
DLKERNELS_UNCOUNTED inline void report_traffic() {
  std::fprintf(
      stderr,
      "traffic %lld %lld\n",
      static_cast<long long>(traffic.loaded),
      static_cast<long long>(traffic.stored));
  traffic = {};
}

}  // namespace cuda_on_cpu

#define DLKERNELS_COUNT(access, touched, counter, bytes) \
  DLKERNELS_UNCOUNTED void access(void* address) {       \
    using namespace cuda_on_cpu;                         \
    if (is_counted(address)) {                           \
      count(touched, traffic.counter, address, bytes);   \
    }                                                    \
  }

#define DLKERNELS_COUNT_N(access, touched, counter)              \
  DLKERNELS_UNCOUNTED void access(void* address, size_t bytes) { \
    using namespace cuda_on_cpu;                                 \
    if (is_counted(address)) {                                   \
      count(touched, traffic.counter, address, bytes);           \
    }                                                            \
  }

extern "C" {
DLKERNELS_COUNT(__asan_load1_noabort, loads, loaded, 1)
DLKERNELS_COUNT(__asan_load2_noabort, loads, loaded, 2)
DLKERNELS_COUNT(__asan_load4_noabort, loads, loaded, 4)
DLKERNELS_COUNT(__asan_load8_noabort, loads, loaded, 8)
DLKERNELS_COUNT(__asan_load16_noabort, loads, loaded, 16)
DLKERNELS_COUNT(__asan_store1_noabort, stores, stored, 1)
DLKERNELS_COUNT(__asan_store2_noabort, stores, stored, 2)
DLKERNELS_COUNT(__asan_store4_noabort, stores, stored, 4)
DLKERNELS_COUNT(__asan_store8_noabort, stores, stored, 8)
DLKERNELS_COUNT(__asan_store16_noabort, stores, stored, 16)
DLKERNELS_COUNT_N(__asan_loadN_noabort, loads, loaded)
DLKERNELS_COUNT_N(__asan_storeN_noabort, stores, stored)
DLKERNELS_UNCOUNTED void __asan_handle_no_return() {}
DLKERNELS_UNCOUNTED void __asan_before_dynamic_init(const void*) {}
DLKERNELS_UNCOUNTED void __asan_after_dynamic_init() {}
}

#undef DLKERNELS_COUNT
#undef DLKERNELS_COUNT_N
