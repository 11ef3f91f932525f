// SPDX-License-Identifier: Apache-2.0
// The main loop of the sm_90a GEMM, both sides of the pipeline: `load_tiles` copies operand tiles to shared memory by TMA (one
// thread of the producer warpgroup), `wgmma_mainloop` multiplies them (each consumer warpgroup, its rows of the tile).

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/sm90.cuh"
#include "gemm_arguments.h"
#include "layout.h"
#include "pipeline.cuh"
#include "tile_scheduler.cuh"

namespace mpk {

constexpr int kWgmmaK = 16;  // of one instruction

// ----- producer: TMA -----

// The k-block of operand rows [first, first + count) (columns, of b): one box where the operand is K-major, else boxes of 64.
template <bool kTransposed, class Load>
__device__ __forceinline__ void load_operand(uint8_t* shared, int first, int count, int k_block, const Load& load) {
  if constexpr (kTransposed) {
    for (int i = 0; i < count; i += 64) load(shared + i * kRowBytes, first + i, k_block * kBlockK);
  } else {
    load(shared, k_block * kBlockK, first);
  }
}

// All k-blocks of all tiles of this block. Each block of a cluster loads its share of b for all of them, by multicast.
template <class Tile, bool kTransA, bool kTransB>
__device__ void load_tiles(const GemmArguments& g, SharedStorage<Tile>& shared) {
  sm90::tma_prefetch(&g.a);
  sm90::tma_prefetch(&g.b);
  sm90::tma_prefetch(&g.out);
  const Range share = share_of_b(Tile::kN, kTransB, g.cluster, static_cast<int>(sm90::cluster_rank()));
  const uint16_t blocks = static_cast<uint16_t>((1 << g.cluster) - 1);
  PipelineState<Tile::kStages> state;
  PersistentTileScheduler<Tile> scheduler(g);
  for (WorkTile tile; scheduler.next(tile);) {
    for (int k_block = tile.k_blocks.begin; k_block < tile.k_blocks.end; ++k_block, state.advance()) {
      sm90::Barrier* const full = &shared.full[state.stage];
      sm90::barrier_wait(&shared.empty[state.stage], state.phase ^ 1);
      sm90::barrier_arrive_expect_tx(full, SharedStorage<Tile>::kStageBytes);
      load_operand<kTransA>(shared.a[state.stage], tile.row, kBlockM, k_block,
                            [&](uint8_t* to, int c0, int c1) { sm90::tma_load(to, &g.a, full, c0, c1); });
      load_operand<kTransB>(shared.b[state.stage] + share.begin * kRowBytes, tile.column + share.begin, share.end - share.begin,
                            k_block, [&](uint8_t* to, int c0, int c1) {
                              if (g.cluster == 1) {
                                sm90::tma_load(to, &g.b, full, c0, c1);
                              } else {
                                sm90::tma_load_multicast(to, &g.b, full, c0, c1, blocks);
                              }
                            });
    }
  }
}

// ----- consumer: WGMMA -----

// NOTE: no product reads what is cleared. But to the compiler the first one does, as it may not: without this, the accumulators
// of a tile hold their registers during the whole epilogue, until the next tile.
template <int kParts, int kValues>
__device__ __forceinline__ void clear(float (&acc)[kParts][kValues]) {
#pragma unroll
  for (int i = 0; i < kParts * kValues; ++i) acc[i / kValues][i % kValues] = 0;
}

// acc (parts of 64 x N) = the warpgroup's rows of a times b. One group of WGMMAs stays in flight while the next is issued: a
// stage is released when the group after it has been.
template <class T, class Tile, bool kTransA, bool kTransB>
__device__ __forceinline__ void wgmma_mainloop(const GemmArguments& g, SharedStorage<Tile>& shared, int warpgroup,
                                               const WorkTile& tile, float (&acc)[Tile::kParts][Tile::kN / 2]) {
  constexpr uint32_t kStepA = kTransA ? kWgmmaK * kRowBytes : kWgmmaK * 2;  // bytes from one WGMMA's operand to the next
  constexpr uint32_t kStepB = kTransB ? kWgmmaK * kRowBytes : kWgmmaK * 2;
  const Range k_blocks = tile.k_blocks;
  PipelineState<Tile::kStages> state{tile.stage, tile.phase};
  int previous_stage = 0;
  for (int k_block = k_blocks.begin; k_block < k_blocks.end; ++k_block, state.advance()) {
    const uint8_t* const rows = shared.a[state.stage] + Tile::first_row(warpgroup, 0) * kRowBytes;
    const uint64_t a = descriptor(sm90::shared_address(rows), kBoxBytes, kAtomBytes);
    const uint64_t b = descriptor(sm90::shared_address(shared.b[state.stage]), kBoxBytes, kAtomBytes);
    sm90::barrier_wait(&shared.full[state.stage], state.phase);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / kWgmmaK; ++k) {
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        sm90::wgmma<T, Tile::kN, kTransA, kTransB>(acc[part], a + descriptor_step(part * kBoxBytes + k * kStepA),
                                                   b + descriptor_step(k * kStepB), k_block > k_blocks.begin || k > 0);
      }
    }
    sm90::wgmma_commit();
    if (k_block > k_blocks.begin) {
      sm90::wgmma_wait<1>();
      release_stage(g, shared, previous_stage);
    }
    previous_stage = state.stage;
  }
  if constexpr (Tile::kPingPong) pass_turn(shared, warpgroup);
  sm90::wgmma_wait_all(acc);
  release_stage(g, shared, previous_stage);
}

}  // namespace mpk
