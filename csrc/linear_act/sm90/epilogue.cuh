// SPDX-License-Identifier: Apache-2.0
// The epilogue of the sm_90a GEMM, by each consumer warpgroup for its 64 rows: bias and ReLU with its mask (fprop), or the mask
// of the previous layer and column sums (dgrad); one rounding; a TMA store through shared memory, which drains while the next
// tile is multiplied. The accumulator is taken in epilogue tiles of 64 columns.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/sm90.cuh"
#include "common/vector.cuh"
#include "gemm_arguments.h"
#include "layout.h"
#include "pipeline.cuh"
#include "tile_scheduler.cuh"

namespace mpk {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kEpilogueN = 64;  // columns of an epilogue tile

// Where a consumer thread is: its warpgroup among the consumers, itself in the warpgroup.
struct ThreadCoord {
  int warpgroup, thread, warp, lane, quad_lane;

  __device__ ThreadCoord()
      : warpgroup(static_cast<int>(threadIdx.x) / kWarpgroup - 1),
        thread(static_cast<int>(threadIdx.x) % kWarpgroup),
        warp(thread / 32),
        lane(thread % 32),
        quad_lane(lane % 4) {}

  __device__ int first_row() const { return warpgroup * kWarpgroupRows; }  // of the warpgroup, in the tile

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

  // The mask's two bits of the values i and i + 1, after rounding.
  __device__ uint32_t nonzero(const AccFragment& acc, int i) const {
    if constexpr (kPacked) return nonzero_pair(packed[i / 2]);
    return static_cast<uint32_t>(!(acc.at[i] <= 0)) | static_cast<uint32_t>(!(acc.at[i + 1] <= 0)) << 1;
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

// ----- bias -----

template <class T>
__device__ __forceinline__ float element(const char* data, int64_t i) {
  Elements<T, 1> one;
  load<LoadReadOnly>(reinterpret_cast<const T*>(data) + i, one);
  return convert<float>(one.at[0]);
}

__device__ __forceinline__ float bias_at(const GemmArguments& g, int column) {
  if (g.bias == nullptr || column >= g.N) return 0;
  const int64_t i = column * g.bias_stride;
  if (g.bias_dtype == ScalarType::Half) return element<Half>(g.bias, i);
  if (g.bias_dtype == ScalarType::BFloat16) return element<BFloat16>(g.bias, i);
  if (g.bias_dtype == ScalarType::Float) return element<float>(g.bias, i);
  return element<double>(g.bias, i);
}

// ----- mask -----

// Butterfly reduce-scatter by OR across the quad: each lane has bits of four words, lane q gets all bits of word q.
__device__ __forceinline__ uint32_t reduce_scatter_words(const uint32_t (&words)[4], int quad_lane) {
  const bool high = quad_lane & 2, odd = quad_lane & 1;
  uint32_t mine[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mine[i] = (high ? words[2 + i] : words[i]) | sm90::shuffle_xor(high ? words[i] : words[2 + i], 2);
  }
  return (odd ? mine[1] : mine[0]) | sm90::shuffle_xor(odd ? mine[0] : mine[1], 1);
}

// fprop: the epilogue tile whose first element is (row, column).
template <class Out>
__device__ __forceinline__ void write_mask(const GemmArguments& g, const OutFragment<Out>& out, const AccFragment& acc,
                                           const ThreadCoord& at, int row, int column) {
  uint32_t words[4] = {};  // of the thread's two rows, two words each
#pragma unroll
  for (int j = 0; j < kEpilogueN / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words[2 * half + j / 4] |= out.nonzero(acc, acc_index(j, half)) << (acc_column(at.thread, j) % 32);
    }
  }
  const uint32_t word = reduce_scatter_words(words, at.quad_lane);
  row += acc_row(at.thread, at.quad_lane / 2);
  column += at.quad_lane % 2 * 32;
  if (row < g.M && column < g.N) {
    __stcs(g.mask + row * g.mask_pitch + column / 32, word & word_bits(g.N - column));
  }
}

// dgrad: the previous layer's mask for one row of a tile; all ones without a mask, zero outside of the matrix.
template <int kWords>
__device__ __forceinline__ void read_mask(const GemmArguments& g, int row, int column, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = row < g.M && column + 32 * i < g.N;
    words[i] = !inside ? 0 : g.mask == nullptr ? ~0u : __ldg(g.mask + row * g.mask_pitch + column / 32 + i);
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

// sums[warp * kEpilogueN + column] = the column's sum over the 16 rows of the warp.
__device__ __forceinline__ void sum_columns(const AccFragment& acc, const ThreadCoord& at, float* sums) {
  float sum[kEpilogueN / 4];  // of column 8 (i / 2) + 2 quad_lane + i % 2
#pragma unroll
  for (int i = 0; i < kEpilogueN / 4; ++i) sum[i] = acc.at[i / 2 * 4 + i % 2] + acc.at[i / 2 * 4 + 2 + i % 2];
  reduce_scatter<8>(sum, at.lane, 16);
  reduce_scatter<4>(sum, at.lane, 8);
  reduce_scatter<2>(sum, at.lane, 4);
  const int j = (at.lane & 16 ? 4 : 0) + (at.lane & 8 ? 2 : 0) + (at.lane & 4 ? 1 : 0);
  float* const to = sums + at.warp * kEpilogueN + acc_column(at.thread, j);
  to[0] = sum[0];
  to[1] = sum[1];
}

// ----- the epilogue of a tile -----

// dgrad: the previous layer's mask for a thread's two rows of the tile.
template <Role kRole, int BLOCK_N>
struct MaskFragment {
  uint32_t words[2][kRole == Role::kDgrad ? BLOCK_N / 32 : 1];
};

// What the epilogue reads, requested before the main loop, which hides the latency.
template <Role kRole, int BLOCK_N>
__device__ __forceinline__ void load_epilogue(const GemmArguments& g, const ThreadCoord& at, const WorkTile& tile,
                                              float* vector, MaskFragment<kRole, BLOCK_N>& mask) {
  if constexpr (kRole == Role::kFprop) {
    for (int i = at.thread; i < BLOCK_N; i += kWarpgroup) vector[i] = bias_at(g, tile.column + i);
  }
  if constexpr (kRole == Role::kDgrad) {
    const int first_row = at.first_row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      read_mask(g, tile.row + first_row + acc_row(at.thread, half), tile.column, mask.words[half]);
    }
  }
}

template <Role kRole, class Out, int BLOCK_N>
__device__ __forceinline__ void store_epilogue(const GemmArguments& g, const ThreadCoord& at, const WorkTile& tile,
                                               SharedStorage<BLOCK_N>& shared, float* vector,
                                               const MaskFragment<kRole, BLOCK_N>& mask, const float (&acc)[BLOCK_N / 2]) {
  const int first_row = at.first_row();
  constexpr int kBoxes = kEpilogueN * sizeof(Out) / kRowBytes;    // of an epilogue tile
  constexpr int kBuffers = kStagingBytes / (kBoxes * kBoxBytes);  // epilogue tiles in flight
#pragma unroll
  for (int c = 0; c < BLOCK_N / kEpilogueN; ++c) {
    uint8_t* const staging = shared.staging[at.warpgroup] + c % kBuffers * kBoxes * kBoxBytes;
    const int column = tile.column + c * kEpilogueN;
    if (at.thread == 0) sm90::tma_store_wait_read<kBuffers - 1>();
    at.sync_warpgroup();  // the buffer is free, and the bias has been written

    AccFragment values;
#pragma unroll
    for (int i = 0; i < kEpilogueN / 2; ++i) {
      values.at[i] = acc[c * kEpilogueN / 2 + i];
      const int j = i / 4, half = i / 2 % 2;
      if constexpr (kRole == Role::kFprop) values.at[i] += vector[c * kEpilogueN + acc_column(at.thread, j) + i % 2];
      if constexpr (kRole == Role::kDgrad) {
        const uint32_t bit = mask.words[half][c * 2 + j / 4] >> (acc_column(at.thread, j) % 32 + i % 2) & 1;
        values.at[i] = bit ? values.at[i] : 0;
      }
    }
    OutFragment<Out> out;
    out.round(values, kRole == Role::kFprop && g.relu);
    out.write(staging, values, at);
    if constexpr (kRole == Role::kFprop) {
      if (g.mask != nullptr) write_mask(g, out, values, at, tile.row + first_row, column);
    }
    if constexpr (kRole == Role::kDgrad) {
      if (g.column_sums != nullptr) sum_columns(values, at, vector);
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
        for (int warp = 0; warp < 4; ++warp) sum += vector[warp * kEpilogueN + at.thread];
        __stcs(g.column_sums + row / kWarpgroupRows * static_cast<int64_t>(g.N) + column + at.thread, sum);
      }
    }
  }
}

#endif  // sm_90a or the host

}  // namespace mpk
