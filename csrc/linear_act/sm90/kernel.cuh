// SPDX-License-Identifier: Apache-2.0
// linear_act's GEMM for sm_90a: out = epilogue(a b), fp16 or bf16 operands, fp32 accumulators, one rounding. This file is the
// kernel; read it first, then along the data:
//
//   tile_scheduler.cuh     which tiles a block computes
//   tile_description.cuh   producer: a tile's place and bias, for the consumers
//   mainloop.cuh           producer: TMA loads; consumers: WGMMA
//   pipeline.cuh           shared memory and the mbarriers between them
//   epilogue.cuh           bias, ReLU, mask, column sums, rounding, TMA stores
//   launch.cu              the operators on the host
//
// A persistent grid of blocks of 384 threads, one per SM, in clusters of one or two. Warpgroup 0, the producer, gives up most
// of its registers. One of its threads loads by TMA into the stages; the blocks of a cluster work on tiles one above the other,
// and each loads half of b for both. Its other warps describe the tiles. Warpgroups 1 and 2, the consumers, multiply 64 rows of
// the tile each. Every sum has one order, whatever the grid.
//
//   BLOCK_M x BLOCK_N x BLOCK_K    stages           staging    bias or sums  shared memory of 232448 bytes
//   128 x 256 x 64                 4 x 48 KB        2 x 16 KB  2 KB          231568
//   128 x 192 x 64                 4 x 40 KB        2 x 16 KB  2 KB          198800
//   128 x 128 x 64                 6 x 32 KB        2 x 16 KB  2 KB          231600
//
// Registers: 168 at launch (384 threads), then 40 for the producer warpgroup and 232 for the consumers.

#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/launch.h"
#include "common/sm90.cuh"
#include "epilogue.cuh"
#include "gemm_arguments.h"
#include "mainloop.cuh"
#include "pipeline.cuh"
#include "tile_description.cuh"

namespace mpk {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// All tiles of this block, by one consumer warpgroup.
template <Role kRole, class T, class Out, int BLOCK_N>
__device__ void compute_tiles(const GemmArguments& g, SharedStorage<BLOCK_N>& shared) {
  const ThreadCoord at;
  PipelineState<SharedStorage<BLOCK_N>::kStages> state;
  float acc[BLOCK_N / 2];
  for (PipelineState<kTileStages> tiles;; tiles.advance()) {
    sm90::barrier_wait(&shared.tile_full[tiles.stage], tiles.phase);
    const WorkTile tile = shared.tiles[tiles.stage];
    if (!tile.exists) break;
    MaskFragment<kRole, BLOCK_N> mask;
    load_epilogue(g, at, tile, mask);
    wgmma_mainloop<T, BLOCK_N, is_a_transposed(kRole), is_b_transposed(kRole)>(g, shared, at.warpgroup, tile.k_blocks, state,
                                                                               acc);
    if constexpr (kRole == Role::kWgrad && std::is_same_v<Out, float>) {
      if (g.added_to != nullptr) add_earlier<BLOCK_N>(g, at, tile, acc);
    }
    store_epilogue<kRole, Out, BLOCK_N>(g, at, tile, shared, shared.bias[tiles.stage], mask, acc);
    if (at.thread == 0) sm90::barrier_arrive(&shared.tile_empty[tiles.stage]);  // all of the warpgroup have read it
  }
  if (at.thread == 0) sm90::tma_store_wait<0>();
}

#endif  // sm_90a or the host

template <Role kRole, class T, class Out, int BLOCK_N>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_kernel(MPK_GRID_CONSTANT(GemmArguments) g) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = *reinterpret_cast<SharedStorage<BLOCK_N>*>(sm90::dynamic_shared());
  if (threadIdx.x == 0) init_barriers(g, shared);
  sm90::cluster_arrive_relaxed();
  sm90::cluster_wait();

  if (threadIdx.x < kWarpgroup) {
    sm90::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) load_tiles<BLOCK_N, is_a_transposed(kRole), is_b_transposed(kRole)>(g, shared);
    if (threadIdx.x >= 32) describe_tiles<kRole>(g, shared, static_cast<int>(threadIdx.x) - 32);
  } else {
    sm90::setmaxnreg_inc<232>();
    compute_tiles<kRole, T, Out, BLOCK_N>(g, shared);
  }

  // A block stays until the other one no longer uses its barriers and its memory.
  sm90::cluster_arrive();
  sm90::cluster_wait();
#endif
}

}  // namespace mpk
