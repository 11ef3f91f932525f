// SPDX-License-Identifier: Apache-2.0
// Kernels for tests/emulator/test_sm90_emulator.py: a pipelined GEMM that can be wrong in many ways, and misuse that the
// emulator must refuse.

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
  int tiles, k_blocks, wrong;
};

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
  const int tiles = g.tiles, k_blocks = g.k_blocks, thread = static_cast<int>(threadIdx.x), wrong = g.wrong;
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
  kMulticastTooEarly,
  kNoSwizzle,
  kBaseOffset,
  kPastShared,
  kTooMuchShared,
};

__global__ void misuse(const Arguments& g) {
  uint8_t* const shared = sm90::dynamic_shared();
  auto* const barrier = reinterpret_cast<Barrier*>(shared + kBox);
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(sm90::cluster_rank());
  const uint64_t tile = 1ull << 62 | 64ull << 32 | sm90::shared_address(shared) >> 4;
  float acc[32] = {}, other[32] = {}, third[32] = {};
  const auto multiply = [&](float (&to)[32], uint64_t a) { sm90::wgmma<Half, 64, false, false>(to, a, tile, false); };
  if (thread == 0 && g.wrong != kUninitialized && !(g.wrong == kMulticastTooEarly && rank == 1)) {
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
    case kMulticastTooEarly:
      if (thread == 0 && rank == 0) {
        sm90::barrier_arrive_expect_tx(barrier, kBox);
        sm90::tma_load_multicast(shared, &g.a, barrier, 0, 0, 3);
      }
      if (rank == 0) sm90::barrier_wait(barrier, 0);
      sm90::cluster_arrive();
      return sm90::cluster_wait();
    case kNoSwizzle:
      sm90::wgmma_fence();
      return multiply(acc, tile & ~(3ull << 62));
    case kBaseOffset:
      sm90::wgmma_fence();
      return multiply(acc, tile | 1ull << 49);
    case kPastShared:
      sm90::wgmma_fence();
      multiply(acc, tile + 0x3000);
      sm90::wgmma_commit();
      return sm90::wgmma_wait_all(acc);
  }
}

// A matrix of fp16 without gaps, in boxes of `box_rows` rows.
TensorMap map_of(const void* data, int64_t rows, int64_t columns, int box_rows) {
  return encode_tensor_map(data, ScalarType::Half, rows, columns, columns, box_rows);
}

// The error of the launch, or an empty string.
const char* run(void (*kernel)(const Arguments&), unsigned blocks, unsigned threads, size_t shared, const Arguments& g) {
  static std::string message;
  message.clear();
  try {
    allow_shared_bytes(kernel, shared);
    launch_clusters(kernel, blocks, blocks, threads, shared, nullptr, g);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

const char* host_run_pipeline(const void* a, const void* b, void* out, int tiles, int k_blocks, int wrong) {
  const int64_t M = tiles * kTile, K = k_blocks * 64;
  const Arguments g{map_of(a, M, K, kTile), map_of(b, kTile, K, kTile), map_of(out, M, kTile, kTile), tiles, k_blocks, wrong};
  return run(pipeline, 1, 160, (2 * kStages + 1) * kBox + 4 * sizeof(Barrier), g);
}

// tensor: 64 x 64.
const char* host_run_misuse(const void* tensor, int blocks, int wrong) {
  const Arguments g{map_of(tensor, kTile, 64, kTile), {}, {}, 0, 0, wrong};
  return run(misuse, blocks, wrong == kPartOfWarpgroup ? 96 : 128, wrong == kTooMuchShared ? 232449 : kBox + 1024, g);
}
}
