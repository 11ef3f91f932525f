// SPDX-License-Identifier: Apache-2.0
// Host emulator: implements cuda_runtime.h: fibers in a seeded random order, poisoned shared memory, checked addresses.
//
// A fiber runs until it waits or ends. The next one is random; the seed makes some warps and blocks faster than others. Between
// two fibers, a pending asynchronous operation (copy, product) completes or is delayed further. When no fiber can run and no
// operation is pending, the launch fails with what each fiber waits for.

#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "cuda_runtime.h"
#include "host.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

// The section of all __shared__ variables, by names that the linker defines.
extern "C" char __start_mpk_shared __attribute__((weak, visibility("hidden")));
extern "C" char __stop_mpk_shared __attribute__((weak, visibility("hidden")));

namespace host {

Counts counts;

namespace {

constexpr unsigned kMaxThreads = 1024, kMaxBlocks = 2;  // of a block, of a cluster
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxArgumentBytes = 32764;
constexpr size_t kMaxShared = 232448, kDefaultShared = 48 << 10;
constexpr int kPoison = 0xff;  // a NaN in every format
constexpr unsigned kExchangeBytes = 32;

enum class ClusterPhase { kOutside, kArrived, kReleased };  // of a thread at the cluster's barrier

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started, ended;
  ClusterPhase cluster_phase;
  const char* waits_at;
  unsigned exchanges;
  bool unreleased, unacquired;  // stores for other blocks, an atomic, with no __threadfence since
  Block* block;
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

std::mt19937 random_order;
std::vector<Range> ranges;
std::map<const void*, size_t> max_shared;  // by kernel
std::string failure;                       // the first of a launch
bool capturing;

std::vector<Fiber> fibers;
std::vector<unsigned> ready;
std::vector<Block> blocks;
jmp_buf scheduler;
unsigned current;
bool in_fiber;
const std::function<void()>* body;

// Double-buffered: a lane may reach its next exchange before the others have read this one.
alignas(16) uint8_t exchanged[2][kMaxThreads * kMaxBlocks][kExchangeBytes];

struct ClusterBarrier {
  unsigned threads, arrived, ended;
  Queue queue;
} cluster_barrier;

struct Failed {};

// ----- fibers -----

// NOTE: setjmp and longjmp once it has started, because swapcontext makes a system call for the signal mask every time.
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
  constexpr unsigned kCount = kMaxThreads * kMaxBlocks;
  static char* const stacks = static_cast<char*>(
      mmap(nullptr, kCount * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  fibers.assign(kCount, Fiber{});
  for (unsigned i = 0; i < kCount; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack = {stacks + i * kStackBytes, 0, kStackBytes};
    makecontext(&fibers[i].context, fiber_main, 0);
  }
}

void resume(unsigned fiber) {
  current = fiber;
  threadIdx.x = fiber - fibers[fiber].block->first;
  blockIdx.x = fibers[fiber].block->index;
  if (_setjmp(scheduler) != 0) {
    in_fiber = false;
    return;
  }
  in_fiber = true;
  if (fibers[fiber].started) _longjmp(fibers[fiber].jump, 1);
  fibers[fiber].started = true;
  setcontext(&fibers[fiber].context);
}

// ----- barriers -----

bool open_block_if_full(Block& block) {
  if (block.live == 0 || block.waiting < block.live) return false;
  block.waiting = 0;
  block.was_any = std::exchange(block.any, false);
  wake(block.queue);
  return true;
}

// Ended threads count as arrived.
void open_cluster_if_full() {
  ClusterBarrier& barrier = cluster_barrier;
  if (barrier.arrived == 0 || barrier.arrived + barrier.ended < barrier.threads) return;
  barrier.arrived = 0;
  for (unsigned i = 0; i < barrier.threads; ++i) {
    if (fibers[i].cluster_phase == ClusterPhase::kArrived) fibers[i].cluster_phase = ClusterPhase::kReleased;
  }
  wake(barrier.queue);
}

void on_thread_end(unsigned fiber) {
  Block& block = *fibers[fiber].block;
  Warp& warp = block.warps[(fiber - block.first) / kWarp];
  --block.live;
  --warp.live;
  ++cluster_barrier.ended;
  if (warp.waiting > 0) fail(std::string("a thread ends while its warp is at ") + warp.where);
  if (fibers[fiber].cluster_phase != ClusterPhase::kOutside)
    fail("a thread ends that has arrived at the cluster's barrier and not waited");
  open_block_if_full(block);
  open_cluster_if_full();
  if (block.live == 0) finish_units(block);
}

// ----- one cluster -----

void make_block(unsigned index, unsigned rank, unsigned first, unsigned threads, size_t shared_bytes) {
  // NOTE: aligned, because a swizzle depends on addresses.
  alignas(1024) static uint8_t shared[kMaxBlocks][kMaxShared];
  std::memset(shared[rank], kPoison, shared_bytes);
  Block block{};
  block.index = index;
  block.rank = rank;
  block.first = first;
  block.threads = block.live = threads;
  block.shared = shared[rank];
  block.shared_bytes = shared_bytes;
  block.warps.resize((threads + kWarp - 1) / kWarp);
  const uint32_t priority = random_order() % 0x20000;
  for (Warp& warp : block.warps) warp.priority = priority + random_order() % 0x10000;
  for (unsigned i = 0; i < threads; ++i) ++block.warps[i / kWarp].live;
  blocks.push_back(block);
}

void start_threads() {
  ready.clear();
  for (Block& block : blocks) {
    for (unsigned i = block.first; i < block.first + block.threads; ++i) {
      Fiber& fiber = fibers[i];
      fiber.ended = false;
      fiber.cluster_phase = ClusterPhase::kOutside;
      fiber.exchanges = 0;
      fiber.unreleased = fiber.unacquired = false;
      fiber.block = &block;
      ready.push_back(i);
    }
  }
  cluster_barrier = {static_cast<unsigned>(ready.size()), 0, 0, {}};
}

// "threads 1-31 at a shuffle;" for each group of threads that have not ended.
void report_deadlock() {
  std::string message;
  for (const Block& block : blocks) {
    if (block.live == 0) continue;
    message += (message.empty() ? "deadlock in block " : " block ") + std::to_string(block.index) + ":";
    for (unsigned i = 0; i < block.threads;) {
      const Fiber& fiber = fibers[block.first + i];
      unsigned end = i + 1;
      if (!fiber.ended) {
        const auto same = [&](const Fiber& other) { return !other.ended && !std::strcmp(other.waits_at, fiber.waits_at); };
        while (end < block.threads && same(fibers[block.first + end])) ++end;
        message +=
            end == i + 1 ? " thread " + std::to_string(i) : " threads " + std::to_string(i) + "-" + std::to_string(end - 1);
        message += std::string(" at ") + fiber.waits_at + ";";
      }
      i = end;
    }
  }
  fail(message);
}

uint32_t priority_of(unsigned fiber) {
  const Block& block = *fibers[fiber].block;
  return block.warps[(fiber - block.first) / kWarp].priority;
}

// The fiber of the fastest warp among `tries` random ones.
unsigned take_ready(unsigned tries) {
  size_t best = random_order() % ready.size();
  for (unsigned i = 1; i < tries; ++i) {
    const size_t other = random_order() % ready.size();
    if (priority_of(ready[other]) > priority_of(ready[best])) best = other;
  }
  std::swap(ready[best], ready.back());
  const unsigned fiber = ready.back();
  ready.pop_back();
  return fiber;
}

void run_cluster() {
  constexpr unsigned kPatience[] = {1, 4, 32}, kTries[] = {1, 2, 16};
  const unsigned patience = kPatience[random_order() % std::size(kPatience)];
  const unsigned tries = kTries[random_order() % std::size(kTries)];
  while (failure.empty()) {
    if (has_events() && (ready.empty() || random_order() % patience == 0)) run_event(ready.empty());
    if (ready.empty() && !has_events()) break;
    if (ready.empty()) continue;
    const unsigned fiber = take_ready(tries);
    resume(fiber);
    if (fibers[fiber].ended) on_thread_end(fiber);
  }
  if (failure.empty() && cluster_barrier.ended < cluster_barrier.threads) report_deadlock();
}

const Range* range_of(uintptr_t address) {
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address, [](uintptr_t a, const Range& range) { return a < range.begin; });
  return after != ranges.begin() && address < std::prev(after)->end ? &*std::prev(after) : nullptr;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) size = config.attrs[i].val.clusterDim.x;
  }
  return size;
}

void check_launch(const cudaLaunchConfig_t& config, const void* kernel, size_t argument_bytes) {
  const unsigned cluster = cluster_of(config);
  const auto asked = max_shared.find(kernel);
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > kMaxThreads) fail("an impossible launch");
  if (argument_bytes > kMaxArgumentBytes) fail("arguments of " + std::to_string(argument_bytes) + " bytes");
  if (cluster == 0 || config.gridDim.x % cluster != 0) fail("a grid that is no multiple of the cluster");
  if (cluster > kMaxBlocks) fail("a cluster of " + std::to_string(cluster) + " blocks");
  if (config.dynamicSmemBytes > (asked == max_shared.end() ? kDefaultShared : asked->second)) {
    fail("more dynamic shared memory than was asked for");
  }
}

// The seed decides the order of the clusters and of all events in them.
void run_grid(const cudaLaunchConfig_t& config) {
  const unsigned size = cluster_of(config), threads = config.blockDim.x;
  std::vector<unsigned> order(config.gridDim.x / size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  for (const unsigned index : order) {
    if (&__stop_mpk_shared != nullptr) std::memset(&__start_mpk_shared, kPoison, &__stop_mpk_shared - &__start_mpk_shared);
    blocks.clear();
    for (unsigned rank = 0; rank < size; ++rank) {
      make_block(index * size + rank, rank, rank * threads, threads, config.dynamicSmemBytes);
    }
    start_threads();
    start_units();
    run_cluster();
    if (!failure.empty()) return;
  }
}

}  // namespace

// ----- for sm90.cpp -----

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
  if (!in_fiber) throw Failed{};
  fibers[current].waits_at = "a failure";
  switch_to_scheduler();  // does not return
  std::abort();
}

void wait_in(Queue& queue, const char* what) {
  fibers[current].waits_at = what;
  queue.fibers.push_back(current);
  switch_to_scheduler();
}

void wake(Queue& queue) {
  ready.insert(ready.end(), queue.fibers.begin(), queue.fibers.end());
  queue.fibers.clear();
}

void yield() {
  ready.push_back(current);
  switch_to_scheduler();
}

Block& current_block() { return *fibers[current].block; }
std::vector<Block>& cluster() { return blocks; }
uint32_t random_number() { return random_order(); }

// ----- what kernels call -----

bool sync_block(bool value) {
  if (fibers[current].unacquired) fail("__syncthreads after an atomic with no __threadfence since");
  Block& block = current_block();
  ++block.waiting;
  block.any |= value;
  if (open_block_if_full(block)) {
    yield();
  } else {
    wait_in(block.queue, "__syncthreads");
  }
  return block.was_any;
}

void sync_warp(const char* where) {
  Warp& warp = current_block().warps[threadIdx.x / kWarp];
  if (warp.live != kWarp) fail(std::string(where) + " of all lanes while some of the warp have ended");
  if (warp.waiting > 0 && std::strcmp(warp.where, where) != 0) {
    fail(std::string("lanes of a warp at ") + where + " and at " + warp.where);
  }
  warp.where = where;
  if (++warp.waiting == kWarp) {
    warp.waiting = 0;
    wake(warp.queue);
    yield();
  } else {
    wait_in(warp.queue, where);
  }
}

unsigned lane() { return threadIdx.x % kWarp; }

void* exchange_slot(unsigned lane) {
  const Fiber& fiber = fibers[current];
  return exchanged[fiber.exchanges % 2][current - threadIdx.x % kWarp + lane];
}

void end_exchange() { ++fibers[current].exchanges; }

void sync_named(int id, int threads) {
  if (id < 0 || id > 15) fail("no named barrier " + std::to_string(id));
  if (threads <= 0 || threads % kWarp != 0) fail("a named barrier for " + std::to_string(threads) + " threads");
  NamedBarrier& barrier = current_block().named[id];
  if (!barrier.arrived.empty() && barrier.expected != static_cast<unsigned>(threads)) {
    fail("a named barrier for " + std::to_string(barrier.expected) + " threads, and for " + std::to_string(threads));
  }
  barrier.expected = threads;
  barrier.arrived.push_back(threadIdx.x);
  if (barrier.arrived.size() < barrier.expected) return wait_in(barrier.queue, "a named barrier");
  std::vector<unsigned> of_warp(current_block().warps.size());
  for (const unsigned thread : barrier.arrived) ++of_warp[thread / kWarp];
  for (const unsigned count : of_warp) {
    if (count % kWarp != 0) fail("a named barrier with a part of a warp");
  }
  barrier.arrived.clear();
  wake(barrier.queue);
  yield();
}

void arrive_cluster() {
  Fiber& fiber = fibers[current];
  if (fiber.cluster_phase != ClusterPhase::kOutside) fail("a thread arrives at the cluster's barrier twice");
  fiber.cluster_phase = ClusterPhase::kArrived;
  ++cluster_barrier.arrived;
  open_cluster_if_full();
}

void wait_cluster() {
  Fiber& fiber = fibers[current];
  if (fiber.cluster_phase == ClusterPhase::kOutside) fail("a thread waits at the cluster's barrier and has not arrived");
  while (fiber.cluster_phase == ClusterPhase::kArrived) wait_in(cluster_barrier.queue, "the cluster's barrier");
  fiber.cluster_phase = ClusterPhase::kOutside;
}

void check_range(const void* pointer, size_t bytes, bool is_store) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const Range* range = range_of(address);
  if (range == nullptr || address + bytes > range->end) {
    fail(std::string(is_store ? "a store" : "a load") + " outside of every tensor");
  }
  if (is_store && !range->writable) fail("a store to a tensor that is only read");
}

void check_access(const void* pointer, size_t bytes, bool is_store) {
  ++counts.accesses;
  (is_store ? counts.stored : counts.loaded) += bytes;
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("an access of " + std::to_string(bytes) + " bytes at an address that is no multiple of it");
  }
  check_range(pointer, bytes, is_store);
}

void on_store_for_blocks() { fibers[current].unreleased = true; }

void on_load_of_blocks() {
  if (fibers[current].unacquired) fail("a load of what other blocks stored after an atomic with no __threadfence since");
}

void on_atomic() {
  if (fibers[current].unreleased) fail("an atomic after stores for other blocks with no __threadfence since");
  fibers[current].unacquired = true;
}

void fence() { fibers[current].unreleased = fibers[current].unacquired = false; }

bool is_known(const void* address) { return range_of(reinterpret_cast<uintptr_t>(address)) != nullptr; }

cudaError_t set_max_shared(const void* kernel, int bytes) {
  failure.clear();
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxShared) {
    failure = "no " + std::to_string(bytes) + " bytes of shared memory for a block";
    return cudaErrorInvalidValue;
  }
  ++counts.attributes;
  max_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, size_t argument_bytes,
                const std::function<void()>& thread) {
  failure.clear();
  ++counts.launches;
  if (fibers.empty()) make_fibers();
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  try {
    check_launch(config, kernel, argument_bytes);
    run_grid(config);
  } catch (const Failed&) {
  }
  if (failure.empty()) return cudaSuccess;
  make_fibers();  // blocked ones are abandoned
  return cudaErrorInvalidConfiguration;
}

}  // namespace host

const char* cudaGetErrorString(cudaError_t) { return host::failure.c_str(); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Counted as the launch that it is.
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  ++host::counts.launches;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = host::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// ----- for the tests, by ctypes -----

extern "C" {

void host_seed(uint32_t seed) { host::random_order.seed(seed); }

// Declares device memory, which kernels may read and, if `writable`, write.
void host_set_memory(const uintptr_t* begins, const int64_t* bytes, const bool* writable, int64_t count) {
  host::ranges.clear();
  for (int64_t i = 0; i < count; ++i) {
    if (bytes[i] > 0) host::ranges.push_back({begins[i], begins[i] + bytes[i], writable[i]});
  }
  std::sort(host::ranges.begin(), host::ranges.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
}

void host_set_capturing(bool capturing) { host::capturing = capturing; }

// The counts since the last call.
void host_take_counts(host::Counts* counts) { *counts = std::exchange(host::counts, {}); }
}
