#pragma once

// CUDA C++ on the CPU, for tests: blocks run one after another, the threads of
// a block as fibers that switch at every barrier and shuffle.
//
// What it finds: a barrier that some threads do not reach; a missing barrier or
// a race between blocks (threads and blocks run in several orders, and results
// must not depend on the order); reads of shared memory that nobody wrote (it
// starts as NaN); accesses out of bounds (arrays in shared memory are
// allocations of their exact size, for AddressSanitizer).
//
// What it cannot find: warps that would run truly at once, memory ordering
// between blocks, and launches that a GPU would refuse.

#include <immintrin.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(DLKERNELS_COUNT_TRAFFIC)
#include "traffic.h"
#endif

#define __global__
#define __device__
#define __host__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_cpu {

enum class Order { Forward, Backward, Shuffled };

// The orders of blocks and threads that programs try: one where they are
// counted.
#if defined(DLKERNELS_COUNT_TRAFFIC)
inline const std::vector<Order> kOrders{Order::Forward};
#else
inline const std::vector<Order> kOrders{
    Order::Forward, Order::Backward, Order::Shuffled};
#endif

struct Dim {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  std::_Exit(3);
}

inline std::vector<int64_t> sequence(int64_t size, Order order) {
  std::vector<int64_t> items(size);
  std::iota(items.begin(), items.end(), 0);
  if (order == Order::Backward) {
    std::reverse(items.begin(), items.end());
  } else if (order == Order::Shuffled) {
    std::mt19937 generator(1);
    std::shuffle(items.begin(), items.end(), generator);
  }
  return items;
}

enum class Space { Global, Shared };

// Memory of an exact size that starts as NaN.
class Memory {
 public:
  explicit Memory(size_t bytes, [[maybe_unused]] Space space = Space::Global)
      : data_(std::malloc(bytes)) {
    std::memset(data_, 0xFF, bytes);
#if defined(DLKERNELS_COUNT_TRAFFIC)
    if (space == Space::Global) {
      count_accesses(data_, bytes);
    }
#endif
  }
  Memory(const Memory&) = delete;
  ~Memory() {
#if defined(DLKERNELS_COUNT_TRAFFIC)
    stop_counting(data_);
#endif
    std::free(data_);
  }
  void* data() const {
    return data_;
  }

 private:
  void* data_;
};

constexpr int kWarp = 32;

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::Ready;
  // Shuffles alternate between two slots: nobody writes a slot again before
  // the whole warp has read it.
  uint64_t shuffles = 0;
  uint32_t slots[2];
};

// The block that runs. There is one at a time.
struct Block {
  std::vector<Fiber> fibers;
  std::map<int, std::unique_ptr<Memory>> shared;
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned current = 0;

  void wait(State barrier) {
    Fiber& fiber = fibers[current];
    fiber.state = barrier;
    swapcontext(&fiber.context, &scheduler);
  }

  static void enter();

  void start(unsigned threads) {
    constexpr size_t kStack = 64 << 10;
    shared.clear();
    fibers.resize(threads);
    for (Fiber& fiber : fibers) {
      if (!fiber.stack) {
        fiber.stack.reset(new char[kStack]);
      }
      fiber.state = State::Ready;
      fiber.shuffles = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
  }

  void run(unsigned threads, Order order);
  bool release_warps();
  bool release_block();
};

inline Block block;
inline Order order = Order::Forward;
inline Dim thread_index;
inline Dim block_index;
inline Dim block_size;
inline Dim grid_size;

inline void Block::enter() {
  block.body();
  block.fibers[block.current].state = State::Done;
}

inline bool Block::release_warps() {
  bool released = false;
  for (size_t first = 0; first < fibers.size(); first += kWarp) {
    const size_t end = std::min(first + kWarp, fibers.size());
    bool all = true;
    for (size_t i = first; i < end; ++i) {
      all = all && fibers[i].state == State::AtWarpBarrier;
    }
    for (size_t i = first; all && i < end; ++i) {
      fibers[i].state = State::Ready;
      released = true;
    }
  }
  return released;
}

inline bool Block::release_block() {
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::AtBlockBarrier) {
      return false;
    }
  }
  for (Fiber& fiber : fibers) {
    fiber.state = State::Ready;
  }
  return true;
}

inline void Block::run(unsigned threads, Order order) {
  start(threads);
  const std::vector<int64_t> turns = sequence(threads, order);
  while (true) {
    size_t done = 0;
    for (const int64_t turn : turns) {
      Fiber& fiber = fibers[turn];
      if (fiber.state == State::Ready) {
        current = static_cast<unsigned>(turn);
        thread_index.x = current;
        swapcontext(&scheduler, &fiber.context);
      }
      done += fiber.state == State::Done;
    }
    if (done == threads) {
      return;
    }
    if (!release_warps() && !release_block()) {
      fail("some threads wait at a barrier that others do not reach");
    }
  }
}

template <typename T>
T* shared_array(int name, size_t size) {
  std::unique_ptr<Memory>& memory = block.shared[name];
  if (!memory) {
    memory = std::make_unique<Memory>(size * sizeof(T), Space::Shared);
  }
  return static_cast<T*>(memory->data());
}

}  // namespace cuda_on_cpu

#define threadIdx ::cuda_on_cpu::thread_index
#define blockIdx ::cuda_on_cpu::block_index
#define blockDim ::cuda_on_cpu::block_size
#define gridDim ::cuda_on_cpu::grid_size

#define DLKERNELS_SHARED(type, name, size) \
  type* const name = ::cuda_on_cpu::shared_array<type>(__COUNTER__, size)

inline void __syncthreads() {
  cuda_on_cpu::block.wait(cuda_on_cpu::State::AtBlockBarrier);
}

inline void __syncwarp(unsigned = 0xFFFFFFFFu) {
  cuda_on_cpu::block.wait(cuda_on_cpu::State::AtWarpBarrier);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4);
  using namespace cuda_on_cpu;
  if (mask != 0xFFFFFFFFu) {
    fail("shuffles are for whole warps here");
  }
  Fiber& fiber = block.fibers[block.current];
  const uint64_t slot = fiber.shuffles++ % 2;
  std::memcpy(&fiber.slots[slot], &value, sizeof(value));
  const unsigned partner = block.current ^ static_cast<unsigned>(lane_mask);
  __syncwarp();
  std::memcpy(&value, &block.fibers[partner].slots[slot], sizeof(value));
  return value;
}

namespace dlkernels::cuda {

template <typename... Parameters>
void launch(
    void (*kernel)(Parameters...),
    int64_t blocks,
    int threads,
    Stream,
    std::type_identity_t<Parameters>... args) {
  using namespace cuda_on_cpu;
  if (blocks > INT32_MAX || threads > 1024) {
    fail("the grid or the block is larger than a GPU takes");
  }
  grid_size.x = static_cast<unsigned>(blocks);
  block_size.x = static_cast<unsigned>(threads);
  block.body = [=] { kernel(args...); };
  for (const int64_t index : sequence(blocks, order)) {
    block_index.x = static_cast<unsigned>(index);
#if defined(DLKERNELS_COUNT_TRAFFIC)
    count_next_block();
#endif
    block.run(static_cast<unsigned>(threads), order);
  }
#if defined(DLKERNELS_COUNT_TRAFFIC)
  report_traffic();
#endif
}

inline void write_vector(uint4* to, uint4 bits) {
  *to = bits;
}

inline void raise_to(uint64_t* number, uint64_t value) {
  *number = std::max(*number, value);
}

inline float half_to_float(uint16_t bits) {
  return _cvtsh_ss(bits);
}

inline uint16_t float_to_half(float value) {
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

}  // namespace dlkernels::cuda
