// SPDX-License-Identifier: Apache-2.0
// The pipelines between the producer warpgroup and the consumer warpgroups: shared memory of the operand stages and of the
// descriptions of tiles, a full and an empty mbarrier per stage, and the state with which either side walks through them.
//
//   operands   producer, warp 0: wait(empty), expect bytes at full, TMA     consumer: wait(full), WGMMA, arrive at empty
//   tiles      producer, warps 1-3: wait(empty), store, arrive at full      consumer: wait(full), all of the tile, arrive at
//   empty

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

template <int BLOCK_N>
struct SharedStorage {
  static constexpr int kStages = BLOCK_N == 128 ? 6 : 4;
  static constexpr int kStageBytes = (kBlockM + BLOCK_N) * kRowBytes;

  uint8_t a[kStages][kBlockM * kRowBytes];
  uint8_t b[kStages][BLOCK_N * kRowBytes];
  uint8_t staging[kConsumerWarpgroups][kStagingBytes];
  union {
    float bias[kTileStages][BLOCK_N];        // fprop, of a tile
    float sums[kConsumerWarpgroups][4][64];  // dgrad, of 64 columns by each warp
  };
  WorkTile tiles[kTileStages];
  sm90::Barrier full[kStages], empty[kStages];
  sm90::Barrier tile_full[kTileStages], tile_empty[kTileStages];
};
static_assert(sizeof(SharedStorage<256>) <= kMaxSharedBytes && sizeof(SharedStorage<192>) <= kMaxSharedBytes &&
              sizeof(SharedStorage<128>) <= kMaxSharedBytes);

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
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By one thread, before the cluster's first barrier.
template <int BLOCK_N>
__device__ void init_barriers(const GemmArguments& g, SharedStorage<BLOCK_N>& shared) {
  for (int stage = 0; stage < SharedStorage<BLOCK_N>::kStages; ++stage) {
    sm90::barrier_init(&shared.full[stage], 1);
    sm90::barrier_init(&shared.empty[stage], kConsumerWarpgroups * kWarpgroup / 32 * g.cluster);
  }
  for (int stage = 0; stage < kTileStages; ++stage) {
    sm90::barrier_init(&shared.tile_full[stage], kDescribers);
    sm90::barrier_init(&shared.tile_empty[stage], kConsumerWarpgroups);
  }
  sm90::fence_barrier_init();
}

// A consumer warp gives a stage back to the producers of the cluster. NOTE: one arrival per warp: wgmma.wait_group covers only
// the calling warp.
template <int BLOCK_N>
__device__ __forceinline__ void release_stage(const GemmArguments& g, SharedStorage<BLOCK_N>& shared, int stage) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < g.cluster) sm90::barrier_arrive_cluster(&shared.empty[stage], lane);
}

#endif  // sm_90a or the host

}  // namespace mpk
