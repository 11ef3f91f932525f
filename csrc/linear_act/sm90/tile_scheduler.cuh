// SPDX-License-Identifier: Apache-2.0
// Which output tiles a block of the persistent grid computes, and in which order. The thread that loads operands and the warps
// that describe tiles to the consumers each run a scheduler of their own and get the same sequence.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/sm90.cuh"
#include "gemm_arguments.h"
#include "layout.h"

namespace mpk {

struct WorkTile {
  int row, column;  // of the tile's first element
  int out_row;      // where the result is written: with split-K, in the split's part of the workspace
  Range k_blocks;
  bool exists;  // false behind the last tile
  int stage;    // where the operands' pipeline is at the first k-block
  uint32_t phase;
};

// The blocks of a cluster take tiles one above the other, so that they share the columns of b.
template <class Tile>
class PersistentTileScheduler {
 public:
  __device__ explicit PersistentTileScheduler(const GemmArguments& g)
      : g_(g),
        rank_(static_cast<int>(sm90::cluster_rank())),
        rows_(static_cast<int>(ceil_div(g.M, kBlockM * g.cluster))),
        columns_(static_cast<int>(ceil_div(g.N, Tile::kN))),
        next_(static_cast<int>(blockIdx.x) / g.cluster) {}

  // Whether there is a further tile.
  __device__ bool next(WorkTile& tile) {
    const int tiles = rows_ * columns_;
    tile.exists = next_ < tiles * g_.splits;
    if (!tile.exists) return false;
    const int split = next_ / tiles;
    const TileCoord at = grouped_tile(next_ % tiles, rows_, columns_, kGroupM);
    tile.row = (at.row * g_.cluster + rank_) * kBlockM;
    tile.column = at.column * Tile::kN;
    tile.out_row = tile.row + split * g_.split_rows;
    tile.k_blocks = split_range(static_cast<int>(ceil_div(g_.K, kBlockK)), split, g_.splits);
    next_ += static_cast<int>(gridDim.x) / g_.cluster;
    return true;
  }

 private:
  const GemmArguments& g_;
  int rank_, rows_, columns_, next_;
};

}  // namespace mpk
