// SPDX-License-Identifier: Apache-2.0
// The epilogue of the sm_90a GEMM, by each consumer warpgroup for 64 rows at a time: bias and ReLU with its mask (fprop), or
// the mask of the previous layer and column sums (dgrad); one rounding; a TMA store through shared memory, which drains while
// the next tile is multiplied. The accumulator is taken in epilogue tiles of 64 columns; the mask is read off what is staged of
// them.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "common/sm90.cuh"
#include "common/vector.cuh"
#include "gemm_arguments.h"
#include "layout.h"
#include "pipeline.cuh"
#include "tile_scheduler.cuh"

namespace mpk {

constexpr int kEpilogueN = 64;  // columns of an epilogue tile

// f(std::integral_constant<int, i>()) for each i.
template <class F, int... i>
__device__ __forceinline__ void for_each_constant(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}

// Where a consumer thread is: its warpgroup among the consumers, itself in the warpgroup.
struct ThreadCoord {
  int warpgroup, thread, warp, lane, quad_lane;

  template <class Index>
  __device__ explicit ThreadCoord(Index thread_of_block)
      : warpgroup(static_cast<int>(thread_of_block / kWarpgroup) - 1),
        thread(static_cast<int>(thread_of_block % kWarpgroup)),
        warp(thread / 32),
        lane(thread % 32),
        quad_lane(lane % 4) {}

  __device__ void sync_warpgroup() const { sm90::named_barrier_sync(1 + warpgroup, kWarpgroup); }
};

// ----- values of an epilogue tile -----

// A thread's 32 of the 64 x kEpilogueN values, in the order of acc_index.
struct AccFragment {
  float at[kEpilogueN / 2];
};

// The same as they are stored: 16-bit results rounded and packed in pairs, fp32 results left in the AccFragment.
template <class Out>
struct OutFragment {
  static constexpr bool kPacked = sizeof(Out) == 2;
  uint32_t packed[kPacked ? kEpilogueN / 4 : 1];

  __device__ void round(AccFragment& acc, bool relu) {
#pragma unroll
    for (int i = 0; i < kEpilogueN / 2; i += 2) {
      float &lo = acc.at[i], &hi = acc.at[i + 1];
      if constexpr (kPacked) {
        packed[i / 2] = relu ? sm90::pack_relu<Out>(lo, hi) : sm90::pack<Out>(lo, hi);
      } else if (relu) {
        lo = sm90::relu(lo);
        hi = sm90::relu(hi);
      }
    }
  }

  // Into staging memory, as boxes of the output's tensor map: 128 bytes of columns each.
  __device__ void write(uint8_t* staging, const AccFragment& acc, const ThreadCoord& at) const {
#pragma unroll
    for (int j = 0; j < kEpilogueN / 8; j += 2) {
      if constexpr (kPacked) {
        const int row = at.warp * 16 + at.lane % 16;
        const int i = acc_index(j, 0) / 2;
        sm90::stmatrix_x4(staging + swizzled(row, j + at.lane / 16), packed[i], packed[i + 1], packed[i + 2], packed[i + 3]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = acc_row(at.thread, k % 2), column = acc_column(at.thread, j + k / 2), i = acc_index(j + k / 2, k % 2);
          uint8_t* const box = staging + column / 32 * kBoxBytes;
          sm90::store_shared(box + swizzled(row, column % 32 / 4) + column % 4 * 4, acc.at[i], acc.at[i + 1]);
        }
      }
    }
  }
};

// ----- mask -----

// A word of the mask: of row `row` of the epilogue tile as it is staged, the columns from 32 half on.
template <class Out>
__device__ __forceinline__ uint32_t staged_mask_word(const uint8_t* staging, int row, int half) {
  uint32_t parts[2] = {};              // so that one instruction need not wait for the one before
  const auto set_bits = [&](auto c) {  // of the 16 bytes c
    constexpr int kChunk = decltype(c)::value;
    uint32_t words[4];
    uint32_t& part = parts[kChunk % 2];
    if constexpr (sizeof(Out) == 2) {
      sm90::load_shared(staging + swizzled(row, half * 4 + kChunk), words);
      sm90::set_nonzero<Out, 8 * kChunk>(part, words[0]);
      sm90::set_nonzero<Out, 8 * kChunk + 2>(part, words[1]);
      sm90::set_nonzero<Out, 8 * kChunk + 4>(part, words[2]);
      sm90::set_nonzero<Out, 8 * kChunk + 6>(part, words[3]);
    } else {
      sm90::load_shared(staging + half * kBoxBytes + swizzled(row, kChunk), words);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(c10::bit_cast<float>(words[i]) <= 0)) part |= 1u << (4 * kChunk + i);
      }
    }
  };
  for_each_constant(set_bits, std::make_integer_sequence<int, 2 * sizeof(Out)>());
  return parts[0] | parts[1];
}

// fprop: the epilogue tile whose first element is (row, column), a word by each thread, of the rows that its warp staged.
template <class Out>
__device__ __forceinline__ void write_mask(const GemmArguments& g, const uint8_t* staging, const ThreadCoord& at, int row,
                                           int column) {
  sm90::sync_warp();  // the warp's rows are staged
  const int staged_row = at.warp * 16 + at.lane % 16, half = at.lane / 16;
  const uint32_t word = staged_mask_word<Out>(staging, staged_row, half);
  row += staged_row;
  column += half * 32;
  if (row < g.M && column < g.N) {
    __stcs(g.mask.words + row * g.mask.pitch + column / 32, word & word_bits(g.N - column));
  }
}

// dgrad: the previous layer's mask of the 64 rows from `row` on; all ones without a mask, zero outside of the matrix. words[c]
// is of epilogue tile c, by a lane as in write_mask: of row lane % 16 of the warp's 16, the columns from 32 (lane / 16) on.
template <int kTiles>
__device__ __forceinline__ void read_mask(const GemmArguments& g, const ThreadCoord& at, int row, int column,
                                          uint32_t (&words)[kTiles]) {
  row += at.warp * 16 + at.lane % 16;
  column += at.lane / 16 * 32;
  const int inside = row < g.M ? g.N - column : 0;  // columns
  const uint32_t* const from = g.mask.words + row * g.mask.pitch + column / 32;
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
    words[c] = c * kEpilogueN < inside ? ~0u : 0;
    if (g.mask.words != nullptr && c * kEpilogueN < inside) words[c] = __ldg(from + c * kEpilogueN / 32);
  }
}

// ----- column sums -----

// A step of a butterfly reduce-scatter across lanes: two lanes each hold 2 kCount partial sums and end up with kCount each.
template <int kCount>
__device__ __forceinline__ void reduce_scatter(float* sum, int lane, int distance) {
  const bool high = lane & distance;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float kept = high ? sum[kCount + i] : sum[i], sent = high ? sum[i] : sum[kCount + i];
    sum[i] = kept + sm90::shuffle_xor(sent, distance);
  }
}

// sums[warp][column] = the column's sum over the 16 rows of the warp.
__device__ __forceinline__ void sum_columns(const AccFragment& acc, const ThreadCoord& at, float (&sums)[4][kEpilogueN]) {
  float sum[kEpilogueN / 4];  // of column 8 (i / 2) + 2 quad_lane + i % 2
#pragma unroll
  for (int i = 0; i < kEpilogueN / 4; ++i) sum[i] = acc.at[i / 2 * 4 + i % 2] + acc.at[i / 2 * 4 + 2 + i % 2];
  reduce_scatter<8>(sum, at.lane, 16);
  reduce_scatter<4>(sum, at.lane, 8);
  reduce_scatter<2>(sum, at.lane, 4);
  const int j = (at.lane & 16 ? 4 : 0) + (at.lane & 8 ? 2 : 0) + (at.lane & 4 ? 1 : 0);
  float* const to = sums[at.warp] + acc_column(at.thread, j);
  to[0] = sum[0];
  to[1] = sum[1];
}

// ----- sums of results -----

// wgrad: adds what is in memory where the tile will be stored to the accumulator.
template <int kValues>
__device__ __forceinline__ void add_earlier(const GemmArguments& g, const ThreadCoord& at, const WorkTile& tile, int first_row,
                                            float (&acc)[kValues]) {
  const int column = tile.column + acc_column(at.thread, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.row + first_row + acc_row(at.thread, half), left = row < g.M ? g.N - column : 0;
    const float* const from = g.added_to + row * g.added_to_pitch + column;
#pragma unroll
    for (int j = 0; j < kValues / 4; ++j) {
      Elements<float, 2> earlier{};
      if (8 * j < left) load<LoadStreaming>(from + 8 * j, earlier);  // N is even
      acc[acc_index(j, half)] += earlier.at[0];
      acc[acc_index(j, half) + 1] += earlier.at[1];
    }
  }
}

// ----- the epilogue of a tile -----

// dgrad: the previous layer's mask of 64 rows of the tile.
template <Role kRole, class Tile>
struct MaskFragment {
  uint32_t words[kRole == Role::kDgrad ? Tile::kN / kEpilogueN : 1];
};

// What the epilogue of the 64 rows from first_row on reads of global memory.
template <Role kRole, class Tile>
__device__ __forceinline__ void load_epilogue(const GemmArguments& g, const ThreadCoord& at, const WorkTile& tile,
                                              int first_row, MaskFragment<kRole, Tile>& mask) {
  if constexpr (kRole == Role::kDgrad) read_mask(g, at, tile.row + first_row, tile.column, mask.words);
}

// Of the 64 rows from first_row on. bias: fprop, of the tile's columns.
template <Role kRole, class Out, class Tile>
__device__ __forceinline__ void store_epilogue(const GemmArguments& g, const ThreadCoord& at, const WorkTile& tile,
                                               int first_row, SharedStorage<Tile>& shared, const float* bias,
                                               const MaskFragment<kRole, Tile>& mask, const float (&acc)[Tile::kN / 2]) {
  constexpr int kBoxes = kEpilogueN * sizeof(Out) / kRowBytes;    // of an epilogue tile
  constexpr int kBuffers = kStagingBytes / (kBoxes * kBoxBytes);  // epilogue tiles in flight
#pragma unroll
  for (int c = 0; c < Tile::kN / kEpilogueN; ++c) {
    uint8_t* const staging = shared.staging[at.warpgroup] + c % kBuffers * kBoxes * kBoxBytes;
    const int column = tile.column + c * kEpilogueN;
    if (at.thread == 0) {  // the last tile's stores have long read their buffers; those of a first part are hidden
      c == 0 ? sm90::tma_store_wait_read<0>() : sm90::tma_store_wait_read<kBuffers - 1>();
    }
    at.sync_warpgroup();  // the buffer is free

    uint32_t masks[2][2];  // of a thread's two rows, of 32 columns each
    if constexpr (kRole == Role::kDgrad) {
#pragma unroll
      for (int i = 0; i < 4; ++i) masks[i / 2][i % 2] = sm90::shuffle(mask.words[c], at.lane / 4 + i / 2 * 8 + i % 2 * 16);
    }
    AccFragment values;
#pragma unroll
    for (int i = 0; i < kEpilogueN / 2; ++i) {
      values.at[i] = acc[c * kEpilogueN / 2 + i];
      const int j = i / 4, half = i / 2 % 2;
      if constexpr (kRole == Role::kFprop) values.at[i] += bias[c * kEpilogueN + acc_column(at.thread, j) + i % 2];
      if constexpr (kRole == Role::kDgrad) {
        const uint32_t bit = masks[half][j / 4] >> (acc_column(at.thread, j) % 32 + i % 2) & 1;
        values.at[i] = bit ? values.at[i] : 0;
      }
    }
    if constexpr (kRole == Role::kDgrad) {
      if (g.column_sums != nullptr) sum_columns(values, at, shared.sums[at.warpgroup]);
    }
    OutFragment<Out> out;
    out.round(values, kRole == Role::kFprop && g.relu);
    out.write(staging, values, at);
    if constexpr (kRole == Role::kFprop) {
      if (g.mask.words != nullptr) write_mask<Out>(g, staging, at, tile.row + first_row, column);
    }

    sm90::fence_proxy_async();
    at.sync_warpgroup();  // the epilogue tile is staged, and the sums of each warp are there
    if (at.thread == 0) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        sm90::tma_store(&g.out, staging + box * kBoxBytes, column + box * kEpilogueN / kBoxes, tile.out_row + first_row);
      }
      sm90::tma_store_commit();
    }
    if constexpr (kRole == Role::kDgrad) {
      const int row = tile.row + first_row;
      if (g.column_sums != nullptr && at.thread < kEpilogueN && row < g.M && column + at.thread < g.N) {
        float sum = 0;
        for (int warp = 0; warp < 4; ++warp) sum += shared.sums[at.warpgroup][warp][at.thread];
        __stcs(g.column_sums + row / kWarpgroupRows * static_cast<int64_t>(g.N) + column + at.thread, sum);
      }
    }
  }
}

}  // namespace mpk
