// SPDX-License-Identifier: Apache-2.0
// What the CUDA words of cuda_runtime.h mean here: fibers in a seeded random order, poisoned shared memory, checked addresses.
//
// A fiber runs until it waits or ends. A barrier opens when every thread that has not ended waits at it; when nobody can run
// and no barrier opens, the launch fails with what each fiber waits for.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "host.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

// The section of all __shared__ variables, by names that the linker defines.
extern "C" char __start_mpk_shared __attribute__((weak, visibility("hidden")));
extern "C" char __stop_mpk_shared __attribute__((weak, visibility("hidden")));

namespace host {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMostArgumentBytes = 32764;
constexpr int kPoison = 0xff;  // a NaN in every format

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started, ended;
  Wait waits_for;
  unsigned exchanges;
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

std::mt19937 random_order;
std::vector<Range> ranges;
Counts counts;
std::string failure;  // the first of a launch
bool capturing;

std::vector<Fiber> fibers;
jmp_buf scheduler;
unsigned current;
const std::function<void()>* body;
uint64_t exchange[2][kMostThreads];  // by turns: a lane may reach its next exchange before the others have read this one

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
}

// ----- fibers -----

// NOTE: setjmp and longjmp once it has started: swapcontext asks the kernel for the signal mask every time.
void switch_to_scheduler() {
  if (_setjmp(fibers[current].jump) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    fibers[current].ended = true;
    switch_to_scheduler();
  }
}

void make_fibers() {
  static char* const stacks = static_cast<char*>(
      mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  fibers.assign(kMostThreads, Fiber{});
  for (unsigned i = 0; i < kMostThreads; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack = {stacks + i * kStackBytes, 0, kStackBytes};
    makecontext(&fibers[i].context, fiber_main, 0);
  }
}

void resume(unsigned thread) {
  current = thread;
  threadIdx.x = thread;
  fibers[thread].waits_for = Wait::kNothing;
  if (_setjmp(scheduler) != 0) return;
  if (fibers[thread].started) _longjmp(fibers[thread].jump, 1);
  fibers[thread].started = true;
  setcontext(&fibers[thread].context);
}

// ----- one block -----

class Block {
 public:
  explicit Block(unsigned threads) : threads_(threads), live_(threads), warps_((threads + kWarp - 1) / kWarp) {
    for (unsigned i = 0; i < threads; ++i) {
      fibers[i].ended = false;
      fibers[i].exchanges = 0;
      ready_.push_back(i);
      ++warps_[i / kWarp].live;
    }
  }

  void run() {
    while (!ready_.empty()) {
      std::swap(ready_[random_order() % ready_.size()], ready_.back());
      const unsigned thread = ready_.back();
      ready_.pop_back();
      resume(thread);
      note(thread);
    }
    if (live_ > 0) report_deadlock();
  }

 private:
  struct Warp {
    int live = 0, waiting = 0;
  };

  void note(unsigned thread) {
    Warp& warp = warps_[thread / kWarp];
    if (fibers[thread].ended) {
      --live_;
      --warp.live;
    } else if (fibers[thread].waits_for == Wait::kWarp) {
      ++warp.waiting;
    } else {
      ++waiting_;
    }
    if (warp.live > 0 && warp.waiting == warp.live) open_warp(thread / kWarp, warp);
    if (live_ > 0 && waiting_ == live_) open_block();
  }

  void open_warp(unsigned index, Warp& warp) {
    const unsigned first = index * kWarp, end = std::min(first + kWarp, threads_);
    if (warp.live != kWarp) fail("a shuffle of all lanes while some of the warp have ended");
    warp.waiting = 0;
    for (unsigned i = first; i < end; ++i) {
      if (!fibers[i].ended) ready_.push_back(i);
    }
  }

  void open_block() {
    waiting_ = 0;
    for (unsigned i = 0; i < threads_; ++i) {
      if (!fibers[i].ended) ready_.push_back(i);
    }
  }

  void report_deadlock() const {
    std::string message = "deadlock in block " + std::to_string(blockIdx.x) + ":";
    for (unsigned i = 0; i < threads_; ++i) {
      if (fibers[i].ended) continue;
      message +=
          " thread " + std::to_string(i) + (fibers[i].waits_for == Wait::kBlock ? " at __syncthreads;" : " at a shuffle;");
    }
    fail(message);
    make_fibers();  // those that hang are abandoned
  }

  unsigned threads_, live_, waiting_ = 0;
  std::vector<Warp> warps_;
  std::vector<unsigned> ready_;
};

const Range* range_of(uintptr_t address) {
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address, [](uintptr_t a, const Range& range) { return a < range.begin; });
  return after != ranges.begin() && address < std::prev(after)->end ? &*std::prev(after) : nullptr;
}

}  // namespace

void wait_for(Wait what) {
  fibers[current].waits_for = what;
  switch_to_scheduler();
}

void* exchange_slot(int lane_from_here) {
  const int lane = static_cast<int>(current % kWarp) + lane_from_here;
  return &exchange[fibers[current].exchanges % 2][lane < kWarp ? current + lane_from_here : current];
}

void end_exchange() { ++fibers[current].exchanges; }

// Whether the access may be done.
bool check_access(const void* pointer, size_t bytes, bool is_store) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  ++counts.accesses;
  (is_store ? counts.stored : counts.loaded) += bytes;
  const Range* range = range_of(address);
  if (address % bytes != 0) {
    fail("an access of " + std::to_string(bytes) + " bytes at an address that is no multiple of it");
  } else if (range == nullptr || address + bytes > range->end) {
    fail(std::string(is_store ? "a store" : "a load") + " outside of every tensor");
  } else if (is_store && !range->writable) {
    fail("a store to a tensor that is only read");
  } else {
    return true;
  }
  return false;
}

bool is_known(const void* address) { return range_of(reinterpret_cast<uintptr_t>(address)) != nullptr; }

cudaError_t run(const cudaLaunchConfig_t& config, size_t argument_bytes, const std::function<void()>& thread) {
  failure.clear();
  ++counts.launches;
  if (fibers.empty()) make_fibers();
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > kMostThreads) fail("an impossible launch");
  if (argument_bytes > kMostArgumentBytes) fail("arguments of " + std::to_string(argument_bytes) + " bytes");
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<unsigned> blocks(config.gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  for (const unsigned block : blocks) {
    if (!failure.empty()) break;
    blockIdx.x = block;
    std::memset(&__start_mpk_shared, kPoison, &__stop_mpk_shared - &__start_mpk_shared);
    Block(config.blockDim.x).run();
  }
  return failure.empty() ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace host

const char* cudaGetErrorString(cudaError_t) { return host::failure.c_str(); }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = host::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// ----- for the tests, by ctypes -----

extern "C" {

void host_seed(uint32_t seed) { host::random_order.seed(seed); }

// Device memory: what kernels may read and, if `writable`, write.
void host_set_memory(const uintptr_t* begins, const int64_t* bytes, const bool* writable, int64_t count) {
  host::ranges.clear();
  for (int64_t i = 0; i < count; ++i) {
    if (bytes[i] > 0) host::ranges.push_back({begins[i], begins[i] + bytes[i], writable[i]});
  }
  std::sort(host::ranges.begin(), host::ranges.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
}

void host_set_capturing(bool capturing) { host::capturing = capturing; }

// Those since the last call.
void host_take_counts(host::Counts* counts) { *counts = std::exchange(host::counts, {}); }
}
