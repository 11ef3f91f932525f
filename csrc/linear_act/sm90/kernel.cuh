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
// the tile each; or, by ping-pong, the 128 rows of every second tile, one of them while the other is in its epilogue. Every sum
// has one order, whatever the grid and the schedule.
//
//   BLOCK_M x BLOCK_N x BLOCK_K    stages           staging    bias or sums  shared memory of 232448 bytes
//   128 x 256 x 64                 4 x 48 KB        2 x 16 KB  2 KB          231600
//   128 x 192 x 64                 4 x 40 KB        2 x 16 KB  2 KB          198832
//   128 x 192 x 64, ping-pong      4 x 40 KB        2 x 16 KB  3 KB          199952
//   128 x 128 x 64                 6 x 32 KB        2 x 16 KB  2 KB          231632
//
// Registers: 168 at launch (384 threads), then 40 for the producer warpgroup and 232 for the consumers, of which the
// accumulators are 128, 96, 192 and 64.

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

// All tiles of this block in which one consumer warpgroup has a part.
template <Role kRole, class T, class Out, class Tile>
__device__ void compute_tiles(const GemmArguments& g, SharedStorage<Tile>& shared) {
  const ThreadCoord at(static_cast<typename Tile::ThreadIndex>(threadIdx.x));
  for (unsigned count = 0;; ++count) {
    const unsigned index = count * Tile::kInFlight + at.warpgroup % Tile::kInFlight;  // among the block's tiles
    const unsigned description = index % Tile::kDescriptions;
    sm90::barrier_wait(&shared.tile_full[description], index / Tile::kDescriptions % 2);
    const WorkTile tile = shared.tiles[description];
    if (!tile.exists) break;
    float acc[Tile::kParts][Tile::kN / 2];
    MaskFragment<kRole, Tile> mask;
    if constexpr (Tile::kPingPong) {
      clear(acc);
      sm90::barrier_wait(&shared.turn[at.warpgroup], (count + at.warpgroup + 1) % 2);  // the first is given
    } else {
      load_epilogue(g, at, tile, Tile::first_row(at.warpgroup, 0), mask);  // the main loop hides the latency
    }
    wgmma_mainloop<T, Tile, is_a_transposed(kRole), is_b_transposed(kRole)>(g, shared, at.warpgroup, tile, acc);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const int first_row = Tile::first_row(at.warpgroup, part);
      if constexpr (Tile::kPingPong) load_epilogue(g, at, tile, first_row, mask);  // the other warpgroup's main loop hides it
      if constexpr (kRole == Role::kWgrad && std::is_same_v<Out, float>) {
        if (g.added_to != nullptr) add_earlier(g, at, tile, first_row, acc[part]);
      }
      store_epilogue<kRole, Out>(g, at, tile, first_row, shared, shared.bias[description], mask, acc[part]);
    }
    if (at.thread == 0) sm90::barrier_arrive(&shared.tile_empty[description]);  // all of the warpgroup have read it
  }
  if (at.thread == 0) sm90::tma_store_wait<0>();
}

template <Role kRole, class T, class Out, class Tile>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_kernel(MPK_GRID_CONSTANT(GemmArguments) g) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(sm90::dynamic_shared());
  if (threadIdx.x == 0) init_barriers(g, shared);
  sm90::cluster_arrive_relaxed();
  sm90::cluster_wait();

  if (threadIdx.x < kWarpgroup) {
    sm90::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) load_tiles<Tile, is_a_transposed(kRole), is_b_transposed(kRole)>(g, shared);
    if (threadIdx.x >= 32) describe_tiles<kRole>(g, shared, static_cast<int>(threadIdx.x) - 32);
  } else {
    sm90::setmaxnreg_inc<232>();
    compute_tiles<kRole, T, Out>(g, shared);
  }

  // A block stays until the other one no longer uses its barriers and its memory.
  sm90::cluster_arrive();
  sm90::cluster_wait();
#endif
}

}  // namespace mpk
