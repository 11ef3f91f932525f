// SPDX-License-Identifier: Apache-2.0
// Host emulator: mbarriers, TMA and WGMMA of sm_90a, completing as early and as late as PTX allows.
//
// A copy lands, and a product reads its operands, at a random later time: some at any time, some only when all threads are
// blocked, some when nearly no other operation is pending either. Each warp of a warpgroup reads at a time of its own. Until
// its wait an accumulator is NaN for the kernel. Ordinary stores must be fenced before the async proxy accesses the same
// memory. Detected undefined behavior fails the launch.
//
// Source: PTX ISA 8.0 and later: mbarrier, cp.async.bulk.tensor, Tensors (swizzling modes), wgmma (matrix descriptor, strides,
// canonical layouts, accumulator fragments), stmatrix, async proxy. Of these: 2-d tiles, and the swizzle of 128 bytes.

#include "common/sm90.cuh"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <limits>
#include <map>

#include "common/clones.h"
#include "cuda.h"
#include "cuda_runtime.h"
#include "fibers.h"
#include "host.h"

namespace host {
namespace {

using mpk::sm90::Operand;

constexpr uint32_t kWindow = 1024;  // where dynamic shared memory starts in the .shared window, after the system's
constexpr uint32_t kLine = 16;      // bytes that a swizzle keeps together
constexpr uint32_t kBoxRow = 128;   // bytes, the width of the swizzle
constexpr int64_t kMaxTx = (1 << 20) - 1;
constexpr int kMaxN = 256, kRows = 64, kWarpRows = 16, kK = 16;
constexpr size_t kMaxAccumulators = 2;  // of a thread at a time

// ----- state of a block -----

struct MBarrier {
  uint32_t expected, pending;
  int64_t tx = 0;
  uint64_t phase = 0;
  unsigned initialized_by = 0;  // thread
  bool fenced = false;          // visible to TMA and to other blocks
  Queue queue;
};

struct StoreGroup {
  int stores = 0, unread = 0, unwritten = 0;
};

struct Thread {
  std::vector<StoreGroup> groups{1};  // the last one is open
  Queue queue;                        // for them
  std::vector<uint32_t> unfenced;     // lines of shared memory with unfenced stores
  // wgmma
  bool fenced = false;
  std::vector<float*> accs;  // registers that the warpgroup's products own
  int64_t issued = 0;
  std::vector<int64_t> committed;  // products up to the end of each group
  size_t waited = 0;               // groups
};

// When an operation completes. 0: at any time; 1: when all threads are blocked; more: when none of less is pending.
using Delay = unsigned;

Delay random_delay() {
  const uint32_t kind = random_number() % 3;
  return kind < 2 ? kind : 2 + random_number() % 256;
}

// Addresses in the window: begin <= address < end.
struct Interval {
  uint32_t begin, end;

  bool meets(uint32_t other_begin, uint32_t other_end) const { return begin < other_end && other_begin < end; }
};

struct Product {
  Operand a, b;
  int n;
  bool accumulate, bf16;
  size_t acc;
  int issued = 0;    // by threads
  Delay delay[4]{};  // by warp
  Interval reads[2]{};
};

// Memory that a TMA store may read until its thread has waited for the group.
struct PendingRead {
  Interval memory;
  unsigned thread;
  size_t group;
};

struct Accumulator {
  int n = 0;
  alignas(32) float tile[kRows][kMaxN];
};

struct Warpgroup {
  std::deque<Product> products;  // those that some warp has not waited for; the first has index `first`
  int64_t first = 0;
  int64_t done[4] = {}, waited[4] = {};  // by warp
  Queue queues[4];
  Accumulator accs[kMaxAccumulators];
};

struct State {
  Block* block;
  std::map<uint32_t, MBarrier> barriers;  // by address
  std::vector<Thread> threads;
  std::deque<Warpgroup> warpgroups;
  std::vector<uint16_t> unfenced;  // per line, the number of unfenced ordinary stores
  std::vector<PendingRead> pending_reads;
};

std::vector<State> states;  // by rank
int64_t products_to_run;    // by warps

State& here() { return states[current_block().rank]; }
Thread& this_thread() { return here().threads[threadIdx.x]; }

// ----- shared memory -----

uint8_t* at(const State& state, uint32_t address, uint32_t bytes) {
  if (address < kWindow || address - kWindow + bytes > state.block->shared_bytes) {
    fail("shared memory that the block does not have");
  }
  return state.block->shared + (address - kWindow);
}

// Before the async proxy accesses the memory.
void check_fenced(const State& state, uint32_t address, uint32_t bytes) {
  at(state, address, bytes);
  for (uint32_t line = (address - kWindow) / kLine; line * kLine < address - kWindow + bytes; ++line) {
    if (state.unfenced[line] > 0) fail("TMA or WGMMA meets ordinary stores to shared memory with no fence.proxy.async since");
  }
}

// Before a write.
void check_no_pending_read(const State& state, uint32_t begin, uint32_t end) {
  for (const PendingRead& read : state.pending_reads) {
    if (read.memory.meets(begin, end)) fail("shared memory is written that a TMA store may still read");
  }
}

void on_store(State& state, uint32_t address, uint32_t bytes) {
  check_no_pending_read(state, address, address + bytes);
  Thread& thread = state.threads[threadIdx.x];
  for (uint32_t line = (address - kWindow) / kLine; line * kLine < address - kWindow + bytes; ++line) {
    ++state.unfenced[line];
    thread.unfenced.push_back(line);
  }
}

void store_bytes(void* shared, const void* value, uint32_t bytes) {
  const uint32_t address = mpk::sm90::shared_address(shared);
  if (address % bytes != 0) fail("a store to shared memory at no multiple of its size");
  on_store(here(), address, bytes);
  std::memcpy(at(here(), address, bytes), value, bytes);
}

// The 128-byte swizzle: bits 4-6 of the address are XORed with bits 7-9.
uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// ----- barriers -----

MBarrier& barrier_at(State& state, uint32_t address) {
  const auto found = state.barriers.find(address);
  if (found == state.barriers.end()) fail("an mbarrier that is not initialized");
  return found->second;
}

void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.tx != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  wake(barrier.queue);
}

void expect_bytes(MBarrier& barrier, int64_t bytes) {
  barrier.tx += bytes;
  if (barrier.tx > kMaxTx || barrier.tx < -kMaxTx) fail("an mbarrier's tx-count is out of range");
  if (barrier.pending == 0 && barrier.tx < 0) fail("more bytes than an mbarrier expects");
}

void arrive(MBarrier& barrier) {
  if (barrier.pending == 0) fail("more arrivals than an mbarrier expects");
  --barrier.pending;
  if (barrier.pending == 0 && barrier.tx < 0) fail("more bytes than an mbarrier expects");
  end_phase_if_complete(barrier);
}

void check_alive(const State& state, const char* what) {
  if (state.block->live == 0) fail(std::string(what) + " reaches a block that has ended");
}

// ----- TMA -----

struct Map {
  uint64_t magic;
  uintptr_t address;
  uint64_t rows, columns, pitch;  // pitch: bytes
  uint32_t element, box_rows;     // element: bytes
};
constexpr uint64_t kMagic = 0x6d7061636b746d61;
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

struct Copy {
  Map map;
  State* state;
  uint32_t shared, barrier;
  int32_t c0, c1;
  bool is_first;  // of a multicast, which counts once
  bool is_store;
  unsigned thread;  // of a store
  size_t group;
  std::vector<uint8_t> read;  // by a store that has not written yet
  Delay delay;
};

std::vector<Copy> copies;

Map read_map(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 64 != 0) fail("a tensor map that is not at a multiple of 64 bytes");
  Map map;
  std::memcpy(&map, pointer, sizeof(map));
  if (map.magic != kMagic) fail("this is no tensor map");
  return map;
}

uint32_t box_bytes(const Map& map) { return map.box_rows * kBoxRow; }

// f(global, byte within the box row, bytes, box row) for each part of the box inside of the tensor.
template <class F>
void for_each_inside(const Copy& copy, const F& f) {
  const int64_t width = kBoxRow / copy.map.element;
  const int64_t begin = std::max<int64_t>(copy.c0, 0), end = std::min<int64_t>(copy.c0 + width, copy.map.columns);
  if (begin >= end) return;
  for (int64_t row = 0; row < copy.map.box_rows; ++row) {
    const int64_t y = copy.c1 + row;
    if (y < 0 || y >= static_cast<int64_t>(copy.map.rows)) continue;
    const auto global = reinterpret_cast<uint8_t*>(copy.map.address + y * copy.map.pitch + begin * copy.map.element);
    f(global, (begin - copy.c0) * copy.map.element, (end - begin) * copy.map.element, row);
  }
}

// f(swizzled address, index) for each line of the box.
template <class F>
void for_each_line(const Copy& copy, const F& f) {
  at(*copy.state, copy.shared, box_bytes(copy.map));
  for (uint32_t i = 0; i < box_bytes(copy.map) / kLine; ++i) f(swizzle(copy.shared + i * kLine), i);
}

void land(const Copy& copy) {
  check_alive(*copy.state, "a TMA load");
  std::vector<uint8_t> box(box_bytes(copy.map), 0);
  for_each_inside(copy, [&](const uint8_t* global, int64_t byte, int64_t bytes, int64_t row) {
    check_range(global, bytes, false);
    std::memcpy(&box[row * kBoxRow + byte], global, bytes);
    if (copy.is_first) counts.tma_loaded += bytes;
  });
  for_each_line(copy, [&](uint32_t place, uint32_t i) {
    check_fenced(*copy.state, place, kLine);
    std::memcpy(at(*copy.state, place, kLine), &box[i * kLine], kLine);
  });
  MBarrier& barrier = barrier_at(*copy.state, copy.barrier);
  if (!barrier.fenced) fail("TMA meets an mbarrier with no fence.mbarrier_init");
  expect_bytes(barrier, -static_cast<int64_t>(box.size()));
  end_phase_if_complete(barrier);
}

void read_box(Copy& copy) {
  copy.read.resize(box_bytes(copy.map));
  for_each_line(copy, [&](uint32_t place, uint32_t i) {
    check_fenced(*copy.state, place, kLine);
    std::memcpy(&copy.read[i * kLine], at(*copy.state, place, kLine), kLine);
  });
  copy.delay = random_delay();
  Thread& thread = copy.state->threads[copy.thread];
  --thread.groups[copy.group].unread;
  wake(thread.queue);
}

void write_box(const Copy& copy) {
  for_each_inside(copy, [&](uint8_t* global, int64_t byte, int64_t bytes, int64_t row) {
    check_range(global, bytes, true);
    std::memcpy(global, &copy.read[row * kBoxRow + byte], bytes);
    counts.tma_stored += bytes;
  });
  Thread& thread = copy.state->threads[copy.thread];
  --thread.groups[copy.group].unwritten;
  wake(thread.queue);
}

void run_copy(size_t which) {
  Copy& copy = copies[which];
  if (copy.is_store && copy.read.empty()) return read_box(copy);
  const Copy done = std::move(copy);
  copy = std::move(copies.back());
  copies.pop_back();
  done.is_store ? write_box(done) : land(done);
}

// ----- WGMMA -----

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// fp16: the bits as an fp32 with fp16's exponent bias, which a factor corrects; this covers subnormals.
MPK_CLONES void widen(const uint16_t* from, float* to, int count, bool bf16) {
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = from[i], sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    uint32_t word = magnitude << 13;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    value *= 0x1p112f;
    std::memcpy(&word, &value, sizeof(word));
    word |= sign | (magnitude >= 0x7c00 ? 0x7f800000u : 0u);
    to[i] = bits_to_float(bf16 ? bits << 16 : word);
  }
}

// The line of an operand that holds element (mn, k). K-major: ((8, m), (8, 2)) : ((128 B, stride), (2 B, 16 B)); MN-major:
// ((64, m), (8, 2)) : ((2 B, leading), (128 B, stride)); then the swizzle.
struct Layout {
  uint32_t start, leading, stride;
  bool transposed;

  explicit Layout(const Operand& operand)
      : start((operand.descriptor & 0x3fff) << 4),
        leading((operand.descriptor >> 16 & 0x3fff) << 4),
        stride((operand.descriptor >> 32 & 0x3fff) << 4),
        transposed(operand.transposed) {
    if (operand.descriptor >> 62 != 1) fail("a matrix descriptor without the swizzle of 128 bytes");
    if ((operand.descriptor >> 49 & 7) != 0) fail("a matrix descriptor with a base offset");
  }

  uint32_t line(int mn, int k) const {
    if (transposed) return swizzle(start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128);
    return swizzle(start + mn / 8 * stride + mn % 8 * 128 + k * 2);
  }

  // Rounded to whole rows of 128 bytes.
  Interval interval(int count) const {
    const uint32_t first = line(0, 0), last = std::max(line(count - 8, kK - 1), line(count - 1, kK - 8));
    return {first / kBoxRow * kBoxRow, (last / kBoxRow + 1) * kBoxRow};
  }
};

// values[mn][k] or, if `by_k`, values[k][mn], of `count` rows or columns from `first` on.
void gather(const State& state, const Operand& operand, int first, int count, bool by_k, bool bf16, float* values) {
  const Layout layout(operand);
  static uint16_t raw[kMaxN * kK];
  const auto line = [&](int mn, int k) {
    const uint32_t address = layout.line(mn, k);
    check_fenced(state, address, kLine);
    return reinterpret_cast<const uint16_t*>(at(state, address, kLine));
  };
  const auto place = [&](int i, int k) -> uint16_t& { return raw[by_k ? k * count + i : i * kK + k]; };
  if (operand.transposed) {
    for (int k = 0; k < kK; ++k) {
      for (int i = 0; i < count; i += 8) {
        const uint16_t* const from = line(first + i, k);
        for (int j = 0; j < 8; ++j) place(i + j, k) = from[j];
      }
    }
  } else {
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < kK; k += 8) {
        const uint16_t* const from = line(first + i, k);
        for (int j = 0; j < 8; ++j) place(i, k + j) = from[j];
      }
    }
  }
  widen(raw, values, count * kK, bf16);
}

// The products are exact in fp32; each sum is rounded, in the order of K.
MPK_CLONES void multiply_add(const float* a, const float* b, float* tile, int n) {
  for (int row = 0; row < kWarpRows; ++row) {
    float* const sums = tile + row * kMaxN;
    for (int k = 0; k < kK; ++k) {
      const float factor = a[row * kK + k];
      for (int column = 0; column < n; ++column) sums[column] += factor * b[k * n + column];
    }
  }
}

// The 16 rows of a warp.
void run_product(State& state, Warpgroup& warpgroup, int warp) {
  static float a[kWarpRows * kK], b[kMaxN * kK];
  const Product& product = warpgroup.products[warpgroup.done[warp] - warpgroup.first];
  gather(state, product.a, warp * kWarpRows, kWarpRows, false, product.bf16, a);
  gather(state, product.b, 0, product.n, true, product.bf16, b);
  float* const tile = warpgroup.accs[product.acc].tile[warp * kWarpRows];
  if (!product.accumulate) std::fill(tile, tile + kWarpRows * kMaxN, 0.0f);
  multiply_add(a, b, tile, product.n);
  ++warpgroup.done[warp];
  --products_to_run;
  wake(warpgroup.queues[warp]);
}

bool can_run(const Warpgroup& warpgroup, int warp) {
  const size_t next = warpgroup.done[warp] - warpgroup.first;
  return next < warpgroup.products.size() && warpgroup.products[next].issued == static_cast<int>(kWarpgroup);
}

Warpgroup& this_warpgroup() {
  std::deque<Warpgroup>& warpgroups = here().warpgroups;
  const size_t index = threadIdx.x / kWarpgroup;
  if (index >= warpgroups.size()) fail("wgmma by a part of a warpgroup");
  return warpgroups[index];
}

// Value i of the thread: element (16 warp + lane / 4 + 8 (i / 2 % 2), 8 (i / 4) + 2 (lane % 4) + i % 2).
float& element(Accumulator& acc, int i) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp;
  return acc.tile[thread / kWarp * kWarpRows + lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

void start_product(Product& product) {
  for (Delay& delay : product.delay) delay = random_delay();
  product.reads[0] = Layout(product.a).interval(kRows);
  product.reads[1] = Layout(product.b).interval(product.n);
  for (const Copy& copy : copies) {
    if (copy.is_store || copy.state != &here()) continue;
    for (const Interval& memory : product.reads) {
      if (memory.meets(copy.shared, copy.shared + box_bytes(copy.map))) fail("wgmma reads what TMA is still loading");
    }
  }
}

// The memory of products that all warps have waited for may be overwritten.
void on_wait(Warpgroup& warpgroup, int warp, int64_t products) {
  warpgroup.waited[warp] = std::max(warpgroup.waited[warp], products);
  while (*std::min_element(warpgroup.waited, warpgroup.waited + 4) > warpgroup.first) {
    warpgroup.products.pop_front();
    ++warpgroup.first;
  }
}

// Before a TMA load.
void check_not_read(const State& state, uint32_t begin, uint32_t end) {
  check_no_pending_read(state, begin, end);
  for (const Warpgroup& warpgroup : state.warpgroups) {
    for (const Product& product : warpgroup.products) {
      for (const Interval& memory : product.reads) {
        if (memory.meets(begin, end)) fail("TMA loads over what wgmma may still read");
      }
    }
  }
}

}  // namespace

// ----- the asynchronous units -----

void start_units() {
  copies.clear();
  products_to_run = 0;
  states.clear();
  states.resize(cluster().size());
  for (State& state : states) {
    state.block = &cluster()[&state - states.data()];
    state.threads.resize(state.block->threads);
    state.unfenced.assign(state.block->shared_bytes / kLine + 1, 0);
    for (unsigned i = 0; i < state.block->threads / kWarpgroup; ++i) state.warpgroups.emplace_back();
  }
}

bool has_events() { return !copies.empty() || products_to_run > 0; }

// Copies and warps with pending products are equally likely, among those whose delay is over.
void run_event(bool all_blocked) {
  struct Event {
    Delay delay;
    size_t copy;
    State* state;
    Warpgroup* warpgroup;
    int warp;
  };
  static std::vector<Event> events;
  events.clear();
  for (size_t i = 0; i < copies.size(); ++i) events.push_back({copies[i].delay, i, nullptr, nullptr, 0});
  for (State& state : states) {
    for (Warpgroup& warpgroup : state.warpgroups) {
      for (int warp = 0; warp < 4; ++warp) {
        if (!can_run(warpgroup, warp)) continue;
        const Product& next = warpgroup.products[warpgroup.done[warp] - warpgroup.first];
        events.push_back({next.delay[warp], 0, &state, &warpgroup, warp});
      }
    }
  }
  Delay now = 0;
  if (all_blocked) {
    const auto less = [](const Event& a, const Event& b) { return a.delay < b.delay; };
    now = std::max(1u, std::min_element(events.begin(), events.end(), less)->delay);
  }
  const auto later = [&](const Event& event) { return event.delay > now; };
  events.erase(std::remove_if(events.begin(), events.end(), later), events.end());
  if (events.empty()) return;
  const Event event = events[random_number() % events.size()];
  event.state == nullptr ? run_copy(event.copy) : run_product(*event.state, *event.warpgroup, event.warp);
}

void finish_units(const Block& block) {
  State& state = states[block.rank];
  for (const Copy& copy : copies) {
    if (copy.state == &state && !copy.is_store) fail("a block ends before a TMA load to it");
    if (copy.state == &state && copy.read.empty()) fail("a block ends before a TMA store has read its memory");
  }
  for (const auto& [address, barrier] : state.barriers) {
    if (barrier.tx != 0) fail("a block ends with bytes that an mbarrier expects, or that it does not");
  }
  for (const Thread& thread : state.threads) {
    if (thread.groups.back().stores > 0) fail("a TMA store that is in no group");
    if (!thread.accs.empty()) fail("a thread ends before its wgmma");
  }
}

}  // namespace host

namespace mpk::sm90 {

using namespace host;

// ----- PTX wrappers: shared memory -----

uint8_t* dynamic_shared() { return current_block().shared; }

uint32_t shared_address(const void* shared) {
  const Block& block = current_block();
  const auto byte = static_cast<const uint8_t*>(shared);
  if (byte < block.shared || byte >= block.shared + block.shared_bytes) fail("not an address of the block's shared memory");
  return static_cast<uint32_t>(byte - block.shared) + kWindow;
}

void store_shared(void* shared, float first, float second) {
  const float values[] = {first, second};
  store_bytes(shared, values, sizeof(values));
}

void load_shared(const void* shared, uint32_t (&words)[4]) {
  const uint32_t address = shared_address(shared);
  if (address % sizeof(words) != 0) fail("a load of shared memory at no multiple of its size");
  std::memcpy(words, host::at(here(), address, sizeof(words)), sizeof(words));
}

// Lane 8 i + r passes the address of row r of matrix i; value i of lane l is pair l % 4 of row l / 4 of matrix i.
void stmatrix_x4(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const uint32_t matrices[] = {m0, m1, m2, m3};
  if (shared_address(row) % 16 != 0) fail("stmatrix at no multiple of 16 bytes");
  std::memcpy(exchange_slot(lane()), &row, sizeof(row));
  host::sync_warp("stmatrix");
  for (unsigned i = 0; i < 4; ++i) {
    uint8_t* to;
    std::memcpy(&to, exchange_slot(8 * i + lane() / 4), sizeof(to));
    store_bytes(to + lane() % 4 * 4, &matrices[i], 4);
  }
  end_exchange();
}

void fence_proxy_async() {
  Thread& thread = this_thread();
  for (const uint32_t line : thread.unfenced) --here().unfenced[line];
  thread.unfenced.clear();
}

// ----- PTX wrappers: barriers -----

void named_barrier_sync(int id, int threads) { sync_named(id, threads); }
void cluster_arrive() { arrive_cluster(); }
void cluster_wait() { wait_cluster(); }
uint32_t cluster_rank() { return current_block().rank; }

void barrier_init(Barrier* barrier, uint32_t arrivals) {
  const uint32_t address = shared_address(barrier);
  if (address % 8 != 0) fail("an mbarrier at no multiple of 8 bytes");
  if (arrivals == 0 || arrivals > kMaxTx) fail("an mbarrier for " + std::to_string(arrivals) + " arrivals");
  MBarrier made{};
  made.expected = made.pending = arrivals;
  made.initialized_by = threadIdx.x;
  if (!here().barriers.emplace(address, made).second) fail("an mbarrier is initialized twice");
}

void fence_barrier_init() {
  for (auto& [address, barrier] : here().barriers) barrier.fenced |= barrier.initialized_by == threadIdx.x;
}

void cluster_arrive_relaxed() {
  for (const auto& [address, barrier] : here().barriers) {
    if (!barrier.fenced && barrier.initialized_by == threadIdx.x) fail("a relaxed arrival after an mbarrier with no fence");
  }
  cluster_arrive();
}

void barrier_arrive(Barrier* barrier) { arrive(barrier_at(here(), shared_address(barrier))); }

void barrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes) {
  MBarrier& here_barrier = barrier_at(here(), shared_address(barrier));
  if (here_barrier.pending == 0) fail("more arrivals than an mbarrier expects");
  expect_bytes(here_barrier, bytes);
  arrive(here_barrier);
}

void barrier_arrive_cluster(Barrier* barrier, uint32_t rank) {
  if (rank >= states.size()) fail("the cluster has no block " + std::to_string(rank));
  check_alive(states[rank], "an arrival");
  MBarrier& there = barrier_at(states[rank], shared_address(barrier));
  if (!there.fenced && rank != cluster_rank()) fail("an arrival from afar at an mbarrier with no fence.mbarrier_init");
  arrive(there);
}

void barrier_wait(Barrier* barrier, uint32_t parity) {
  MBarrier& here_barrier = barrier_at(here(), shared_address(barrier));
  if (parity > 1) fail("a parity that is neither 0 nor 1");
  if (random_number() % 4 == 0) yield();
  while (here_barrier.phase % 2 == parity)
    wait_in(here_barrier.queue, parity ? "an mbarrier, parity 1" : "an mbarrier, parity 0");
}

// ----- PTX wrappers: TMA -----

void tma_prefetch(const TensorMap* map) { read_map(map); }

void tma_load(void* shared, const TensorMap* map, Barrier* barrier, int32_t c0, int32_t c1) {
  tma_load_multicast(shared, map, barrier, c0, c1, static_cast<uint16_t>(1u << cluster_rank()));
}

void tma_load_multicast(void* shared, const TensorMap* map, Barrier* barrier, int32_t c0, int32_t c1, uint16_t blocks) {
  const uint32_t to = shared_address(shared), signal = shared_address(barrier);
  if (to % kBoxRow != 0) fail("TMA to shared memory at no multiple of 128 bytes");
  if (blocks == 0 || blocks >> states.size() != 0) fail("TMA to a block that the cluster does not have");
  bool is_first = true;
  for (unsigned rank = 0; rank < states.size(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    check_not_read(states[rank], to, to + box_bytes(read_map(map)));
    copies.push_back({read_map(map), &states[rank], to, signal, c0, c1, is_first, false, 0, 0, {}, random_delay()});
    is_first = false;
  }
}

void tma_store(const TensorMap* map, const void* shared, int32_t c0, int32_t c1) {
  const uint32_t from = shared_address(shared);
  if (from % kBoxRow != 0) fail("TMA from shared memory at no multiple of 128 bytes");
  Thread& thread = this_thread();
  here().pending_reads.push_back({{from, from + box_bytes(read_map(map))}, threadIdx.x, thread.groups.size() - 1});
  ++thread.groups.back().stores;
  ++thread.groups.back().unread;
  ++thread.groups.back().unwritten;
  copies.push_back(
      {read_map(map), &here(), from, 0, c0, c1, true, true, threadIdx.x, thread.groups.size() - 1, {}, random_delay()});
}

void tma_store_commit() { this_thread().groups.emplace_back(); }

void tma_store_wait(int groups, bool only_read) {
  Thread& thread = this_thread();
  const size_t committed = thread.groups.size() - 1, waited = committed - std::min<size_t>(committed, groups);
  const auto is_done = [&](const StoreGroup& group) { return (only_read ? group.unread : group.unwritten) == 0; };
  const auto all_done = [&] { return std::all_of(thread.groups.begin(), thread.groups.begin() + waited, is_done); };
  while (!all_done()) wait_in(thread.queue, only_read ? "a TMA store's reading" : "a TMA store");
  const auto is_done_reading = [&](const PendingRead& read) { return read.thread == threadIdx.x && read.group < waited; };
  std::vector<PendingRead>& reads = here().pending_reads;
  reads.erase(std::remove_if(reads.begin(), reads.end(), is_done_reading), reads.end());
}

// ----- PTX wrappers: WGMMA -----

void wgmma_fence() { this_thread().fenced = true; }

void wgmma(float* acc, int n, Operand a, Operand b, bool accumulate, bool bf16) {
  Warpgroup& warpgroup = this_warpgroup();
  Thread& thread = this_thread();
  if (!thread.fenced) fail("wgmma with no wgmma.fence since the accumulator was the thread's");
  const size_t which = std::find(thread.accs.begin(), thread.accs.end(), acc) - thread.accs.begin();
  if (which == kMaxAccumulators) fail("the emulator has two accumulators at a time");
  if (which == thread.accs.size()) {
    for (int i = 0; i < n / 2; ++i) {
      element(warpgroup.accs[which], i) = acc[i];
      acc[i] = std::numeric_limits<float>::quiet_NaN();
    }
    thread.accs.push_back(acc);
    warpgroup.accs[which].n = n;
  }
  if (warpgroup.accs[which].n != n) fail("wgmma of two sizes into one accumulator");
  const int64_t index = thread.issued++ - warpgroup.first;
  if (index == static_cast<int64_t>(warpgroup.products.size())) {
    warpgroup.products.push_back({a, b, n, accumulate, bf16, which});
    start_product(warpgroup.products.back());
  }
  Product& product = warpgroup.products[index];
  const bool same_operands = product.a == a && product.b == b && product.n == n && product.bf16 == bf16;
  if (!same_operands || product.accumulate != accumulate || product.acc != which) {
    fail("the threads of a warpgroup differ in their wgmma");
  }
  if (++product.issued == static_cast<int>(kWarpgroup)) products_to_run += 4;
}

// .sync.aligned, as all of wgmma: what a lane does behind it, all of its warp have come to.
void wgmma_commit() {
  host::sync_warp("wgmma.commit_group");
  this_thread().committed.push_back(this_thread().issued);
}

void wgmma_wait(int groups) {
  Warpgroup& warpgroup = this_warpgroup();
  Thread& thread = this_thread();
  const size_t all = thread.committed.size(), waited = all > static_cast<size_t>(groups) ? all - groups : 0;
  const int64_t products = waited > 0 ? thread.committed[waited - 1] : 0;
  const unsigned warp = threadIdx.x % kWarpgroup / kWarp;
  while (warpgroup.done[warp] < products) wait_in(warpgroup.queues[warp], "wgmma's products");
  on_wait(warpgroup, warp, products);
  thread.waited = std::max(thread.waited, waited);
  if (thread.accs.empty() || thread.waited < all || products < thread.issued) return;
  for (size_t which = 0; which < thread.accs.size(); ++which) {
    Accumulator& acc = warpgroup.accs[which];
    for (int i = 0; i < acc.n / 2; ++i) thread.accs[which][i] = element(acc, i);
  }
  thread.accs.clear();
  thread.fenced = false;
}

}  // namespace mpk::sm90

// ----- the driver -----

// Refuses what the driver refuses, and what is not emulated.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (rank != 2 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || begin == 0 || begin % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (strides[0] == 0 || strides[0] % 16 != 0 || strides[0] >> 40 != 0) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i) {
    if (sizes[i] == 0 || sizes[i] > (1ull << 32) || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (element_strides[i] != 1) return CUDA_ERROR_INVALID_VALUE;
  }
  if (box[0] * element != host::kBoxRow) return CUDA_ERROR_INVALID_VALUE;
  const host::Map made{host::kMagic, begin, sizes[1], sizes[0], strides[0], element, box[1]};
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = is_known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
