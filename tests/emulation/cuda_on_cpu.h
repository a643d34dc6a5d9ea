// Runs CUDA source on a CPU, for tests: the .cu files include this where nvcc is not the compiler. Blocks run one after
// the other on one OS thread, with one fiber for each CUDA thread, switched at barriers and warp shuffles.
//
//   CUDA_ON_CPU_ORDER        0: threads and blocks in order; 1: reversed; more: shuffled by that seed
//   CUDA_ON_CPU_PROCESSORS   what the device says of its multiprocessors
//
// It aborts where barriers or shuffles diverge and where a launch is invalid. Under TSan a switch orders nothing, only
// barriers, shuffles and kernel boundaries do, so a missing barrier is a reported race. Blocks are ordered, and
// approximate instructions, clocks and streams do not exist: those need a GPU.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
#define __shared__ static

#if defined(__SANITIZE_THREAD__)
#define EMULATION_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
#define EMULATION_UNCHECKED
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#endif

struct Index3 {
  unsigned x, y, z;
};

namespace emulation {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 * 1024, kPage = 4096;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  std::fflush(stderr);
  std::abort();
}

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  unsigned thread;
  State state;
  char* stack;
  ucontext_t context;
  void* sanitizer;
};

// Lanes meet here to exchange values. Two buffers: a lane that runs ahead to the next exchange must not overwrite what
// a slower one has yet to read.
struct Warp {
  uint32_t alive, mask, arrived;
  unsigned turn;
  uint64_t values[2][kWarp];
  char order[2];
};

struct Machine {
  Index3 block, grid, threads;
  unsigned num_threads, num_waiting, num_done, num_barriers;
  Fiber* current;
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / kWarp];
  std::function<void()> kernel;
  ucontext_t scheduler;
  void* scheduler_sanitizer;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
  // Addresses for TSan's acquire and release. Two for barriers, in turn: a thread that runs ahead to the next barrier
  // must not be ordered before one that has yet to leave the last.
  char begin, end, barrier[2];
};

inline Machine machine;

inline int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

// Sanitizers are told of every switch; TSan with flag 1, so that the switch itself orders nothing.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define EMULATION_FAST_SWITCH  // swapcontext makes a system call; this takes 10 ns
extern "C" void emulation_switch(void** save, void* load);
__asm__(
    ".text\n.weak emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size "
    "emulation_switch,.-emulation_switch\n");
inline void* fiber_stacks[kMaxThreads];
inline void* scheduler_top;
#endif

EMULATION_UNCHECKED inline void resume(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.sanitizer, 1);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_sanitizer, fiber.stack, kStack);
#endif
#ifdef EMULATION_FAST_SWITCH
  emulation_switch(&scheduler_top, fiber_stacks[fiber.thread]);
#else
  swapcontext(&machine.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_sanitizer, nullptr, nullptr);
#endif
}

EMULATION_UNCHECKED inline void pause(State state) {
  Fiber& fiber = *machine.current;
  fiber.state = state;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.scheduler_sanitizer, 1);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.sanitizer, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
#ifdef EMULATION_FAST_SWITCH
  emulation_switch(&fiber_stacks[fiber.thread], scheduler_top);
#else
  swapcontext(&fiber.context, &machine.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

EMULATION_UNCHECKED inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  __tsan_acquire(&machine.begin);
  machine.kernel();
  __tsan_release(&machine.end);
  const unsigned thread = machine.current->thread;
  machine.warps[thread / kWarp].alive &= ~(1u << thread % kWarp);
  ++machine.num_done;
  pause(State::kDone);
  fail("a finished thread was resumed");
}

EMULATION_UNCHECKED inline void start(Fiber& fiber, unsigned thread) {
  fiber.thread = thread;
  fiber.state = State::kReady;
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(fiber.stack, kPage, PROT_NONE);
#if defined(__SANITIZE_THREAD__)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
#ifdef EMULATION_FAST_SWITCH
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber_stacks[thread] = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &run_thread, 0);
#endif
}

EMULATION_UNCHECKED inline void run_block(unsigned block, const std::vector<unsigned>& order) {
  machine.block = {block, 0, 0};
  machine.num_waiting = machine.num_done = 0;
  for (Warp& warp : machine.warps) warp.alive = warp.arrived = 0;
  for (unsigned thread = 0; thread < machine.num_threads; ++thread) {
    start(machine.fibers[thread], thread);
    machine.warps[thread / kWarp].alive |= 1u << thread % kWarp;
  }
  __tsan_release(&machine.begin);
  while (machine.num_done < machine.num_threads) {
    bool has_progressed = false;
    for (unsigned thread : order) {
      if (machine.fibers[thread].state != State::kReady) continue;
      resume(machine.fibers[thread]);
      has_progressed = true;
    }
    if (machine.num_waiting && machine.num_waiting + machine.num_done == machine.num_threads) {
      if (machine.num_done) fail("__syncthreads after some threads have exited");
      machine.num_waiting = 0;
      ++machine.num_barriers;
      for (unsigned thread = 0; thread < machine.num_threads; ++thread) machine.fibers[thread].state = State::kReady;
      has_progressed = true;
    }
    if (!has_progressed) fail("deadlock: a barrier or a shuffle that not every thread of it reached");
  }
  __tsan_acquire(&machine.end);
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t num_blocks, unsigned num_threads, Arguments... arguments) {
  if (num_threads == 0 || num_threads > kMaxThreads || num_threads % kWarp) fail("invalid block size");
  if (num_blocks < 1 || num_blocks > INT32_MAX) fail("invalid grid size");
  machine.grid = {static_cast<unsigned>(num_blocks), 1, 1};
  machine.threads = {num_threads, 1, 1};
  machine.num_threads = num_threads;
  machine.kernel = [=] { kernel(arguments...); };
#if defined(__SANITIZE_THREAD__)
  machine.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> blocks(num_blocks), threads(num_threads);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::iota(threads.begin(), threads.end(), 0u);
  const int order = setting("CUDA_ON_CPU_ORDER", 0);
  if (order == 1) {
    std::reverse(blocks.begin(), blocks.end());
    std::reverse(threads.begin(), threads.end());
  } else if (order > 1) {
    std::mt19937 generator(order);
    std::shuffle(blocks.begin(), blocks.end(), generator);
    std::shuffle(threads.begin(), threads.end(), generator);
  }
  for (unsigned block : blocks) run_block(block, threads);
}

EMULATION_UNCHECKED inline void barrier() {
  char* order = &machine.barrier[machine.num_barriers % 2];
  __tsan_release(order);
  ++machine.num_waiting;
  pause(State::kAtBarrier);
  __tsan_acquire(order);
}

EMULATION_UNCHECKED inline uint64_t exchange(uint32_t mask, uint64_t value, unsigned distance) {
  const unsigned thread = machine.current->thread, lane = thread % kWarp;
  Warp& warp = machine.warps[thread / kWarp];
  if (!(mask >> lane & 1)) fail("a lane shuffles without being in the mask");
  if (mask & ~warp.alive) fail("the mask of a shuffle names a lane that has exited");
  if (warp.arrived && warp.mask != mask) fail("lanes of a warp shuffle with different masks");
  const unsigned buffer = warp.turn & 1;
  warp.mask = mask;
  warp.values[buffer][lane] = value;
  warp.arrived |= 1u << lane;
  __tsan_release(&warp.order[buffer]);
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.turn;
    for (unsigned i = thread - lane; i < thread - lane + kWarp; ++i) {
      if (machine.fibers[i].state == State::kAtShuffle) machine.fibers[i].state = State::kReady;
    }
  } else {
    pause(State::kAtShuffle);
  }
  __tsan_acquire(&warp.order[buffer]);
  return lane + distance < kWarp ? warp.values[buffer][lane + distance] : value;
}

EMULATION_UNCHECKED inline Index3 thread_index() { return {machine.current->thread, 0, 0}; }
EMULATION_UNCHECKED inline Index3 block_index() { return machine.block; }
EMULATION_UNCHECKED inline Index3 block_size() { return machine.threads; }
EMULATION_UNCHECKED inline Index3 grid_size() { return machine.grid; }

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())
#define NP_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), emulation::launch(kernel, blocks, threads, __VA_ARGS__))

inline void __syncthreads() { emulation::barrier(); }

template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned distance) {
  uint64_t bits = 0;
  static_assert(sizeof value <= sizeof bits);
  std::memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(mask, bits, distance);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using std::min;

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::setting("CUDA_ON_CPU_PROCESSORS", 1), cudaSuccess;
}
