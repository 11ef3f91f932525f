// SPDX-License-Identifier: Apache-2.0
// What the consumers need of a tile beside its operands: where it lies, and in fprop its bias. The warps of the producer
// warpgroup that load no operands work it out while the consumers multiply the tiles before, up to Tile::kDescriptions ahead.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bias.cuh"
#include "common/sm90.cuh"
#include "gemm_arguments.h"
#include "pipeline.cuh"
#include "tile_scheduler.cuh"

namespace mpk {

// All tiles of this block and, for each that is computed at a time, one behind them, which does not exist. `thread` is one of
// kDescribers.
template <Role kRole, class Tile>
__device__ void describe_tiles(const GemmArguments& g, SharedStorage<Tile>& shared, int thread) {
  PipelineState<Tile::kDescriptions> state;
  PipelineState<Tile::kStages> operands;
  PersistentTileScheduler<Tile> scheduler(g);
  WorkTile tile;
  for (int behind = 0; behind < Tile::kInFlight; behind += !tile.exists) {
    if (scheduler.next(tile)) {
      tile.stage = operands.stage;
      tile.phase = operands.phase;
      operands.advance(tile.k_blocks.end - tile.k_blocks.begin);
    }
    sm90::barrier_wait(&shared.tile_empty[state.stage], state.phase ^ 1);
    if (thread == 0) shared.tiles[state.stage] = tile;
    if constexpr (kRole == Role::kFprop) {
      for (int i = thread; tile.exists && i < Tile::kN; i += kDescribers) {
        shared.bias[state.stage][i] = bias_at(g.bias, tile.column + i, g.N);
      }
    }
    sm90::barrier_arrive(&shared.tile_full[state.stage]);
    state.advance();
  }
}

}  // namespace mpk
