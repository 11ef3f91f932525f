// SPDX-License-Identifier: Apache-2.0
// The pipelines between the producer warpgroup and the consumer warpgroups: shared memory of the operand stages and of the
// descriptions of tiles, a full and an empty mbarrier per stage, and the state with which either side walks through them.
//
//   operands   producer, warp 0: wait(empty), expect bytes at full, TMA     consumer: wait(full), WGMMA, arrive at empty
//   tiles      producer, warps 1-3: wait(empty), store, arrive at full      consumer: wait(full), all of the tile, arrive at
//   empty
//
// and in ping-pong a barrier for each consumer warpgroup, at which the other one gives it the turn to multiply.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/sm90.cuh"
#include "gemm_arguments.h"
#include "layout.h"
#include "tile_scheduler.cuh"

namespace mpk {

constexpr int kStagingBytes = 16384;       // epilogue staging of a consumer warpgroup
constexpr int kMaxSharedBytes = 232448;    // of a block on sm_90
constexpr int kBoxBytes = 64 * kRowBytes;  // of a TMA box of 64 rows

template <class Tile>
struct SharedStorage {
  static constexpr int kStageBytes = (kBlockM + Tile::kN) * kRowBytes;

  uint8_t a[Tile::kStages][kBlockM * kRowBytes];
  uint8_t b[Tile::kStages][Tile::kN * kRowBytes];
  uint8_t staging[kConsumerWarpgroups][kStagingBytes];
  union {
    float bias[Tile::kDescriptions][Tile::kN];  // fprop, of a tile
    float sums[kConsumerWarpgroups][4][64];     // dgrad, of 64 columns by each warp
  };
  WorkTile tiles[Tile::kDescriptions];
  sm90::Barrier full[Tile::kStages], empty[Tile::kStages];
  sm90::Barrier tile_full[Tile::kDescriptions], tile_empty[Tile::kDescriptions];
  sm90::Barrier turn[kConsumerWarpgroups];  // ping-pong
};

// The next stage, and the phase (the parity) of its barriers.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }

  __device__ void advance(int count) {
    stage += count;
    phase ^= stage / kStages & 1;
    stage %= kStages;
  }
};

// By one thread, before the cluster's first barrier.
template <class Tile>
__device__ void init_barriers(const GemmArguments& g, SharedStorage<Tile>& shared) {
  constexpr int kWarps = kWarpgroup / 32;
  static_assert(sizeof(shared) <= kMaxSharedBytes);
  for (int stage = 0; stage < Tile::kStages; ++stage) {
    sm90::barrier_init(&shared.full[stage], 1);
    sm90::barrier_init(&shared.empty[stage], Tile::kWarpgroups * kWarps * g.cluster);
  }
  for (int stage = 0; stage < Tile::kDescriptions; ++stage) {
    sm90::barrier_init(&shared.tile_full[stage], kDescribers);
    sm90::barrier_init(&shared.tile_empty[stage], Tile::kWarpgroups);
  }
  for (sm90::Barrier& turn : shared.turn) sm90::barrier_init(&turn, kWarps);
  sm90::fence_barrier_init();
}

// A consumer warp gives a stage back to the producers of the cluster. NOTE: one arrival per warp: wgmma.wait_group covers only
// the calling warp.
template <class Tile>
__device__ __forceinline__ void release_stage(const GemmArguments& g, SharedStorage<Tile>& shared, int stage) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < g.cluster) sm90::barrier_arrive_cluster(&shared.empty[stage], lane);
}

// Ping-pong: a consumer warp that has issued its last WGMMA of a tile gives the turn to the other warpgroup. So the main loops
// run in the order of the tiles, which is that of the operands. NOTE: without turns a warpgroup would wait for a full stage
// more than one phase ahead, where a parity tells nothing.
template <class Tile>
__device__ __forceinline__ void pass_turn(SharedStorage<Tile>& shared, int warpgroup) {
  if (threadIdx.x % 32 == 0) sm90::barrier_arrive(&shared.turn[1 - warpgroup]);
}

}  // namespace mpk
