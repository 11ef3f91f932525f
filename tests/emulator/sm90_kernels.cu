// SPDX-License-Identifier: Apache-2.0
// Kernels for tests/emulator/test_sm90_emulator.py: one per PTX wrapper, to compare with its definition; a pipelined GEMM that
// can be wrong in many ways; and misuse that the emulator must refuse.

#include <cuda_runtime.h>

#include <exception>
#include <string>

#include "common/clusters.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"

namespace {

using namespace mpk;
using sm90::Barrier;

struct Arguments {
  TensorMap a, b, out;
  const uint16_t* image;  // of shared memory
  float* floats;
  uint16_t* halves;
  int box_rows, c0, c1, wrong;
  uint64_t desc_a, desc_b;
};

// ----- TMA -----

// A box as TMA lays it out in shared memory.
__global__ void dump_box(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  const int bytes = g.box_rows * 128;
  auto* const barrier = reinterpret_cast<Barrier*>(shared + bytes);
  if (threadIdx.x == 0) {
    sm90::barrier_init(barrier, 1);
    sm90::fence_barrier_init();
    sm90::barrier_arrive_expect_tx(barrier, bytes);
    sm90::tma_load(shared, &g.a, barrier, g.c0, g.c1);
  }
  __syncthreads();
  sm90::barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) __stcs(g.halves + i, reinterpret_cast<uint16_t*>(shared)[i]);
}

// Two blocks, each of which loads half of the rows for both. `wrong`: before both have initialized their mbarriers.
__global__ void dump_multicast(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  const int bytes = g.box_rows * 128, rank = static_cast<int>(sm90::cluster_rank());
  auto* const barrier = reinterpret_cast<Barrier*>(shared + 2 * bytes);
  if (threadIdx.x == 0) {
    sm90::barrier_init(barrier, 1);
    sm90::fence_barrier_init();
  }
  if (!g.wrong) {
    sm90::cluster_arrive();
    sm90::cluster_wait();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sm90::barrier_arrive_expect_tx(barrier, 2 * bytes);
    sm90::tma_load_multicast(shared + rank * bytes, &g.a, barrier, g.c0, g.c1 + rank * g.box_rows, 3);
  }
  sm90::barrier_wait(barrier, 0);
  uint16_t* const to = g.halves + blockIdx.x * bytes;
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) __stcs(to + i, reinterpret_cast<uint16_t*>(shared)[i]);
  sm90::cluster_arrive();
  sm90::cluster_wait();
}

void copy_image(const Arguments& g, uint8_t* shared, int bytes) {
  for (int i = 8 * threadIdx.x; i < bytes; i += 8 * blockDim.x) {
    float two[2];
    std::memcpy(two, g.image + i / 2, sizeof(two));
    sm90::store_shared(shared + i, two[0], two[1]);
  }
}

// An image of shared memory, stored as a box.
__global__ void store_box(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  copy_image(g, shared, g.box_rows * 128);
  sm90::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    sm90::tma_store(&g.out, shared, g.c0, g.c1);
    sm90::tma_store_commit();
    sm90::tma_store_wait<0>();
  }
}

// ----- stmatrix and rounding -----

// Lane l passes row l of 32 rows of 16 bytes, and as value i the pair (4 l + i, 4 l + i + 1000).
__global__ void dump_stmatrix(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  const uint32_t lane = threadIdx.x;
  const auto pair = [&](uint32_t i) { return (4 * lane + i) * 0x10001u + (1000u << 16); };
  sm90::stmatrix_x4(shared + 16 * lane, pair(0), pair(1), pair(2), pair(3));
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += 32) __stcs(g.halves + i, reinterpret_cast<uint16_t*>(shared)[i]);
}

template <class T>
__global__ void dump_pack(const Arguments& g) {
  const int i = threadIdx.x;
  const uint32_t plain = sm90::pack<T>(g.floats[2 * i], g.floats[2 * i + 1]);
  const uint32_t positive = sm90::pack_relu<T>(g.floats[2 * i], g.floats[2 * i + 1]);
  std::memcpy(g.halves + 2 * i, &plain, sizeof(plain));
  std::memcpy(g.halves + 2 * blockDim.x + 2 * i, &positive, sizeof(positive));
}

// Every pattern of 16 bits beside another one: bits 5 and 6 of a word.
template <class T>
__global__ void dump_nonzero(const Arguments& g) {
  for (uint32_t i = threadIdx.x; i < 0x10000; i += blockDim.x) {
    uint32_t word = 1;
    sm90::set_nonzero<T, 5>(word, i | (i * 0x9e37u & 0xffff) << 16);
    g.halves[i] = static_cast<uint16_t>(word);
  }
}

// ----- WGMMA -----

// A product twice: overwriting, then accumulating. Shared memory is given as an image; the fragments are dumped.
template <class T, int N, bool trans_a, bool trans_b>
__global__ void dump_wgmma(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  copy_image(g, shared, g.box_rows * 128);
  sm90::fence_proxy_async();
  __syncthreads();
  float acc[N / 2];
  for (float& value : acc) value = 12345;
  const uint64_t start = sm90::shared_address(shared) >> 4;
  sm90::wgmma_fence();
  sm90::wgmma<T, N, trans_a, trans_b>(acc, g.desc_a + start, g.desc_b + start, false);
  sm90::wgmma<T, N, trans_a, trans_b>(acc, g.desc_a + start, g.desc_b + start, true);
  sm90::wgmma_commit();
  sm90::wgmma_wait_all(acc);
  for (int i = 0; i < N / 2; ++i) __stcs(g.floats + threadIdx.x * (N / 2) + i, acc[i]);
}

// ----- a pipeline, and what can be wrong with it -----

enum Wrong {
  kCorrect,
  kSwappedParity,      // of the waits for full stages
  kNoFullWait,         // products of operands that have not arrived
  kNoEmptyWait,        // a stage is loaded again while it is read
  kEarlyRelease,       // a stage is released before the wait for its products
  kOneArrivalTooMany,  // expected at a full stage
  kOneArrivalTooFew,   // expected at an empty stage
  kTooManyBytes,       // expected
  kTooFewBytes,        // expected
  kShiftedSwizzle,     // of the stored chunk
  kShiftedDescriptor,  // by a row
  kNoProxyFence,       // between stmatrix and the TMA store
  kNoWaitRead,         // the staging memory is written again while it is stored
  kNoStoreWait,        // the block ends while it is stored
  kNoCommit,           // of the stores
  kNoProductWait,      // the accumulator is read before its wait
  kNoWgmmaFence,       //
  kNoBarrierFence,     // of initialized barriers
  kWrongNamedBarrier,  // for more threads than come
  kNoNamedBarrier,     // between stmatrix and the TMA store
  kPastSharedMemory,   // a load
  kUnfinishedLoad,     // that no thread waits for
  kHalfWarpStmatrix,   //
};

constexpr int kStages = 2, kTile = 64, kBox = kTile * 128;

// out (tiles of 64 x 64, one below the other) = a b.T: a (64 tiles x K), b (64 x K). Warpgroup 0 is the consumer, thread 128
// the producer.
__global__ void pipeline(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  auto* const full = reinterpret_cast<Barrier*>(shared + (2 * kStages + 1) * kBox);
  Barrier* const empty = full + kStages;
  const int tiles = g.c1, k_blocks = g.c0, thread = static_cast<int>(threadIdx.x), wrong = g.wrong;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      sm90::barrier_init(full + i, wrong == kOneArrivalTooMany ? 2 : 1);
      sm90::barrier_init(empty + i, wrong == kOneArrivalTooFew ? 3 : 4);
    }
    if (wrong != kNoBarrierFence) sm90::fence_barrier_init();
  }
  __syncthreads();
  const auto stage_of = [&](int i) { return i % kStages; };
  const auto phase_of = [&](int i) { return static_cast<uint32_t>(i / kStages % 2); };
  const int count = tiles * k_blocks;
  if (thread >= 128) {
    if (thread > 128) return;
    for (int i = 0; i < count; ++i) {
      const int stage = stage_of(i), k_block = i % k_blocks, tile = i / k_blocks;
      uint8_t* const to = shared + 2 * stage * kBox;
      if (wrong != kNoEmptyWait) sm90::barrier_wait(empty + stage, phase_of(i) ^ 1);
      sm90::barrier_arrive_expect_tx(full + stage, 2 * kBox + (wrong == kTooManyBytes) * 16 - (wrong == kTooFewBytes) * 16);
      sm90::tma_load(to, &g.a, full + stage, k_block * 64, tile * kTile);
      sm90::tma_load(wrong == kPastSharedMemory ? shared + (2 * kStages + 1) * kBox : to + kBox, &g.b, full + stage,
                     k_block * 64, 0);
    }
    if (wrong == kUnfinishedLoad) sm90::tma_load(shared, &g.a, full, 0, 0);
    return;
  }
  float acc[32];
  const int warp = thread / 32, lane = thread % 32;
  for (int tile = 0, i = 0; tile < tiles; ++tile) {
    for (int k_block = 0; k_block < k_blocks; ++k_block, ++i) {
      const int stage = stage_of(i);
      if (wrong != kNoFullWait) sm90::barrier_wait(full + stage, phase_of(i) ^ (wrong == kSwappedParity));
      if (wrong != kNoWgmmaFence) sm90::wgmma_fence();
      const uint32_t at = sm90::shared_address(shared + 2 * stage * kBox) + (wrong == kShiftedDescriptor) * 128;
      const uint64_t form = 1ull << 62 | 64ull << 32;
      for (int k = 0; k < 4; ++k) {
        sm90::wgmma<Half, 64, false, false>(acc, form | (at + k * 32) >> 4, form | (at + kBox + k * 32) >> 4, k_block + k > 0);
      }
      sm90::wgmma_commit();
      if (wrong == kEarlyRelease && lane == 0) sm90::barrier_arrive(empty + stage);
      if (wrong != kNoProductWait) sm90::wgmma_wait_all(acc);
      if (wrong != kEarlyRelease && lane == 0) sm90::barrier_arrive(empty + stage);
    }
    uint8_t* const staging = shared + 2 * kStages * kBox;
    if (thread == 0 && wrong != kNoWaitRead) sm90::tma_store_wait_read<0>();
    sm90::named_barrier_sync(1, wrong == kWrongNamedBarrier ? 160 : 128);
    for (int j = 0; j < 8; j += 2) {
      const int row = warp * 16 + lane % 16, chunk = (j + lane / 16) ^ ((row + (wrong == kShiftedSwizzle)) % 8);
      uint32_t m[4];
      for (int k = 0; k < 4; ++k) m[k] = sm90::pack<Half>(acc[4 * j + 2 * k], acc[4 * j + 2 * k + 1]);
      if (wrong == kHalfWarpStmatrix && lane >= 16) continue;
      sm90::stmatrix_x4(staging + row * 128 + chunk * 16, m[0], m[1], m[2], m[3]);
    }
    if (wrong != kNoProxyFence) sm90::fence_proxy_async();
    if (wrong != kNoNamedBarrier) sm90::named_barrier_sync(1, 128);
    if (thread == 0) {
      sm90::tma_store(&g.out, staging, 0, tile * kTile);
      if (wrong != kNoCommit) sm90::tma_store_commit();
    }
  }
  if (wrong == kNoProductWait) sm90::wgmma_wait_all(acc);
  if (thread == 0 && wrong != kNoStoreWait) sm90::tma_store_wait<0>();
}

// ----- misuse that PTX does not allow -----

enum Misuse {
  kArrivesTwice,
  kWaitsUnarrived,
  kEndsArrived,
  kTwoCounts,
  kPartOfWarp,
  kNoSuchBarrier,
  kNotWarps,
  kInitializedTwice,
  kUninitialized,
  kMisalignedBarrier,
  kEndedBlock,
  kNoSuchBlock,
  kTooManyArrivals,
  kTxOutOfRange,
  kUnalignedStmatrix,
  kUnalignedBox,
  kNoMap,
  kTwoInstructions,
  kWgmmaDiffers,
  kUnfinishedWgmma,
  kThreeAccumulators,
  kPartOfWarpgroup,
  kEndsInWarp,
  kUnfencedArrival,
};

__global__ void misuse(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  auto* const barrier = reinterpret_cast<Barrier*>(shared + 4096);
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(sm90::cluster_rank());
  const uint64_t tile = 1ull << 62 | 64ull << 32 | sm90::shared_address(shared) >> 4;
  float acc[32] = {}, other[32] = {}, third[32] = {};
  const auto multiply = [&](float (&to)[32], uint64_t a) { sm90::wgmma<Half, 64, false, false>(to, a, tile, false); };
  if (thread == 0 && g.wrong != kUninitialized) {
    sm90::barrier_init(barrier, g.wrong == kEndedBlock ? 128 : 1);
    sm90::fence_barrier_init();
  }
  sm90::cluster_arrive();
  sm90::cluster_wait();
  switch (g.wrong) {
    case kArrivesTwice:
      sm90::cluster_arrive();
      return sm90::cluster_arrive();
    case kWaitsUnarrived:
      return sm90::cluster_wait();
    case kEndsArrived:
      return sm90::cluster_arrive();
    case kTwoCounts:
      return sm90::named_barrier_sync(1, thread < 32 ? 64 : 128);
    case kPartOfWarp:
      if (thread < 48 || thread >= 112) sm90::named_barrier_sync(1, 64);
      return;
    case kNoSuchBarrier:
      return sm90::named_barrier_sync(16, 128);
    case kNotWarps:
      return sm90::named_barrier_sync(1, 48);
    case kInitializedTwice:
      return sm90::barrier_init(barrier, 1);
    case kUninitialized:
      return sm90::barrier_wait(barrier, 1);
    case kMisalignedBarrier:
      return sm90::barrier_init(reinterpret_cast<Barrier*>(shared + 4), 1);
    case kEndedBlock:
      if (rank == 1) sm90::barrier_arrive_cluster(barrier, 0);
      return;
    case kNoSuchBlock:
      return sm90::barrier_arrive_cluster(barrier, 2);
    case kTooManyArrivals:
      if (thread == 0) sm90::barrier_arrive_expect_tx(barrier, 16);
      __syncthreads();
      return sm90::barrier_arrive(barrier);
    case kTxOutOfRange:
      return sm90::barrier_arrive_expect_tx(barrier, 1 << 20);
    case kUnalignedStmatrix:
      return sm90::stmatrix_x4(shared + 8, 0, 0, 0, 0);
    case kUnalignedBox:
      return sm90::tma_load(shared + 64, &g.a, barrier, 0, 0);
    case kNoMap:
      return sm90::tma_prefetch(&g.b);
    case kTwoInstructions:
      if (thread % 2) return sm90::stmatrix_x4(shared, 0, 0, 0, 0);
      sm90::shuffle_xor(thread, 1);
      return;
    case kWgmmaDiffers:
      sm90::wgmma_fence();
      return multiply(acc, tile + thread / 64);
    case kUnfinishedWgmma:
      sm90::wgmma_fence();
      return multiply(acc, tile);
    case kThreeAccumulators:
      sm90::wgmma_fence();
      multiply(acc, tile);
      multiply(other, tile);
      return multiply(third, tile);
    case kPartOfWarpgroup:
      sm90::wgmma_fence();
      return multiply(acc, tile);
    case kEndsInWarp:
      if (thread % 32 > 0) sm90::shuffle_xor(thread, 1);
      return;
    case kUnfencedArrival:
      if (thread == 0) sm90::barrier_init(barrier + 1, 1);
      sm90::cluster_arrive_relaxed();
      return sm90::cluster_wait();
  }
}

using Kernel = void (*)(const Arguments&);

template <class T, int N>
Kernel wgmma_kernel(bool trans_a, bool trans_b) {
  if (trans_a) return trans_b ? dump_wgmma<T, N, true, true> : dump_wgmma<T, N, true, false>;
  return trans_b ? dump_wgmma<T, N, false, true> : dump_wgmma<T, N, false, false>;
}

template <class T>
Kernel wgmma_kernel(int n, bool trans_a, bool trans_b) {
  if (n == 64) return wgmma_kernel<T, 64>(trans_a, trans_b);
  if (n == 128) return wgmma_kernel<T, 128>(trans_a, trans_b);
  return n == 192 ? wgmma_kernel<T, 192>(trans_a, trans_b) : wgmma_kernel<T, 256>(trans_a, trans_b);
}

struct Matrix {
  const void* data;
  int dtype;  // 0: fp16, 1: bf16, 2: fp32
  int64_t rows, columns, pitch;
};

TensorMap map_of(const Matrix& matrix, int box_rows) {
  constexpr ScalarType kTypes[] = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float};
  return encode_tensor_map(matrix.data, kTypes[matrix.dtype], matrix.rows, matrix.columns, matrix.pitch, box_rows);
}

}  // namespace

// A request of a test; tests/emulator/test_sm90_emulator.py declares the same struct.
struct Case {
  const char* kernel;
  Matrix a, b, out;
  const uint16_t* image;
  float* floats;
  uint16_t* halves;
  int box_rows, c0, c1, wrong;
  int n, bf16, trans_a, trans_b;
  uint64_t desc_a, desc_b;
};

// Returns the error of the launch, or an empty string.
extern "C" const char* host_run_kernel(const Case& c) {
  static std::string message;
  message.clear();
  try {
    Arguments g{};
    if (c.a.data) g.a = map_of(c.a, c.box_rows);
    if (c.b.data) g.b = map_of(c.b, c.box_rows);
    if (c.out.data) g.out = map_of(c.out, c.box_rows);
    g.image = c.image;
    g.floats = c.floats;
    g.halves = c.halves;
    g.box_rows = c.box_rows;
    g.c0 = c.c0;
    g.c1 = c.c1;
    g.wrong = c.wrong;
    g.desc_a = c.desc_a;
    g.desc_b = c.desc_b;
    const std::string name = c.kernel;
    const auto run = [&](Kernel kernel, unsigned blocks, unsigned threads, size_t shared) {
      allow_shared_bytes(kernel, shared);
      launch_clusters(kernel, blocks, blocks, threads, shared, nullptr, g);
    };
    const size_t box = c.box_rows * 128;
    if (name == "box") run(dump_box, 1, 64, box + 8);
    if (name == "multicast") run(dump_multicast, 2, 64, 2 * box + 8);
    if (name == "store") run(store_box, 1, 64, box);
    if (name == "stmatrix") run(dump_stmatrix, 1, 32, 512);
    if (name == "pack") run(c.bf16 ? dump_pack<BFloat16> : dump_pack<Half>, 1, 128, 0);
    if (name == "nonzero") run(c.bf16 ? dump_nonzero<BFloat16> : dump_nonzero<Half>, 1, 128, 0);
    if (name == "wgmma") {
      run(c.bf16 ? wgmma_kernel<BFloat16>(c.n, c.trans_a, c.trans_b) : wgmma_kernel<Half>(c.n, c.trans_a, c.trans_b), 1, 128,
          box);
    }
    if (name == "misuse") run(misuse, c.n, c.wrong == kPartOfWarpgroup ? 96 : 128, 8192);
    if (name == "pipeline") run(pipeline, 1, 160, (2 * kStages + 1) * kBox + 4 * sizeof(Barrier));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
