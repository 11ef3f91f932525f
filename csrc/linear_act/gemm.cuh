// SPDX-License-Identifier: Apache-2.0
// linear_act's GEMM for sm_90a: out = epilogue(a b), fp16 or bf16 operands, fp32 accumulators, one rounding.
//
//                a (rows x depth)       b (depth x columns)      epilogue
//   fprop        x                      weight.T                 bias, ReLU, mask of the rounded output
//   dgrad        grad_z                 weight                   mask of the layer below selects; its column sums
//   wgrad        grad_z.T               x                        none; a part of the depth, where it is split
//
// A persistent grid of blocks of 384 threads, one per multiprocessor, in clusters of one or two. Warpgroup 0 gives its
// registers away, and one thread of it loads by TMA into a ring of stages; a cluster works on tiles one above the other and
// each of its blocks loads half of b for both. Warpgroups 1 and 2 multiply, 64 rows of the tile each, and store by TMA through
// shared memory of their own, which drains while the next tile is multiplied. Every sum has one order, whatever the grid.
//
//   BLOCK_M x BLOCK_N x BLOCK_K    stages           staging    scalars  shared memory of 232448 bytes
//   128 x 256 x 64                 4 x 48 KB        2 x 16 KB  2 KB     231488
//   128 x 128 x 64                 6 x 32 KB        2 x 16 KB  2 KB     231520
//
// Registers: 168 at launch (384 threads), then 40 for the loading warpgroup and 232 for those that multiply.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/launch.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/vector.cuh"
#include "layout.h"

namespace mpk {

enum class Role { kFprop, kDgrad, kWgrad };

constexpr int kBlockM = 128, kBlockK = 64;
constexpr int kWarpgroup = 128, kMultiplyingWarpgroups = 2;
constexpr int kGemmThreads = kWarpgroup * (1 + kMultiplyingWarpgroups);
constexpr int kWarpgroupRows = kBlockM / kMultiplyingWarpgroups;
constexpr int kGroup = 8;             // bands of so many tiles: 8 x 128 rows
constexpr int kChunk = 64;            // columns that are staged at a time
constexpr int kWgmmaK = 16;           // of one instruction
constexpr int kBoxBytes = 64 * 128;   // of 64 rows
constexpr int kStagingBytes = 16384;  // of a warpgroup

struct GemmArguments {
  TensorMap a, b, out;
  int rows, columns, depth;
  int cluster;             // blocks that share b: 1 or 2
  int splits, split_rows;  // of the depth, each written below the other, so many rows apart
  const char* bias;        // fprop; or null
  int64_t bias_stride;     // elements
  ScalarType bias_dtype;   //
  bool relu;               // fprop
  uint32_t* mask;          // written by fprop, read by dgrad; or null
  int64_t mask_pitch;      // words
  float* column_sums;      // dgrad: (ceil(rows / 64), columns); or null
};

template <int BLOCK_N>
struct GemmShared {
  static constexpr int kStages = BLOCK_N == 256 ? 4 : 6;
  static constexpr int kStageBytes = (kBlockM + BLOCK_N) * kRowBytes;

  uint8_t a[kStages][kBlockM * kRowBytes];
  uint8_t b[kStages][BLOCK_N * kRowBytes];
  uint8_t staging[kMultiplyingWarpgroups][kStagingBytes];
  float scalars[kMultiplyingWarpgroups][256];  // fprop: the bias of the tile; dgrad: sums of four warps, 64 columns
  sm90::Barrier full[kStages], empty[kStages];
};
static_assert(sizeof(GemmShared<256>) <= 232448 && sizeof(GemmShared<128>) <= 232448);

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The stage of the ring that comes next, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The tiles of a block, one after the other.
struct Work {
  int row, column;  // of the first element
  int out_row;      // where it is written
  Range steps;      // of kBlockK along the depth
};

template <int BLOCK_N>
class Schedule {
 public:
  __device__ explicit Schedule(const GemmArguments& g)
      : g_(g),
        rank_(static_cast<int>(sm90::cluster_rank())),
        rows_(static_cast<int>(ceil_div(g.rows, kBlockM * g.cluster))),
        columns_(static_cast<int>(ceil_div(g.columns, BLOCK_N))),
        next_(static_cast<int>(blockIdx.x) / g.cluster) {}

  __device__ bool next(Work& work) {
    const int tiles = rows_ * columns_;
    if (next_ >= tiles * g_.splits) return false;
    const int split = next_ / tiles;
    const TileAt at = grouped_tile(next_ % tiles, rows_, columns_, kGroup);
    work.row = (at.row * g_.cluster + rank_) * kBlockM;
    work.column = at.column * BLOCK_N;
    work.out_row = work.row + split * g_.split_rows;
    work.steps = part_of(static_cast<int>(ceil_div(g_.depth, kBlockK)), split, g_.splits);
    next_ += static_cast<int>(gridDim.x) / g_.cluster;
    return true;
  }

 private:
  const GemmArguments& g_;
  int rank_, rows_, columns_, next_;
};

// ----- load -----

// Rows [first, first + count) of the operand (columns of b) at step `step` of the depth, into `shared`: boxes of 64 along the
// operand's row where the memory runs along it, else one box of all of them.
template <bool kTransposed, class Load>
__device__ __forceinline__ void load_operand(uint8_t* shared, int first, int count, int step, const Load& load) {
  if constexpr (kTransposed) {
    for (int i = 0; i < count; i += 64) load(shared + i * kRowBytes, first + i, step * kBlockK);
  } else {
    load(shared, step * kBlockK, first);
  }
}

template <int BLOCK_N, bool kTransA, bool kTransB>
__device__ void load_tiles(const GemmArguments& g, GemmShared<BLOCK_N>& shared) {
  sm90::tma_prefetch(&g.a);
  sm90::tma_prefetch(&g.b);
  sm90::tma_prefetch(&g.out);
  const int share = BLOCK_N / g.cluster, part = static_cast<int>(sm90::cluster_rank()) * share;
  const uint16_t blocks = static_cast<uint16_t>((1 << g.cluster) - 1);
  Ring<GemmShared<BLOCK_N>::kStages> ring;
  Schedule<BLOCK_N> schedule(g);
  for (Work work; schedule.next(work);) {
    for (int step = work.steps.begin; step < work.steps.end; ++step, ring.advance()) {
      sm90::Barrier* const full = &shared.full[ring.stage];
      sm90::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      sm90::barrier_arrive_expect_tx(full, GemmShared<BLOCK_N>::kStageBytes);
      load_operand<kTransA>(shared.a[ring.stage], work.row, kBlockM, step,
                            [&](uint8_t* to, int c0, int c1) { sm90::tma_load(to, &g.a, full, c0, c1); });
      load_operand<kTransB>(shared.b[ring.stage] + part * kRowBytes, work.column + part, share, step,
                            [&](uint8_t* to, int c0, int c1) {
                              if (g.cluster == 1) {
                                sm90::tma_load(to, &g.b, full, c0, c1);
                              } else {
                                sm90::tma_load_multicast(to, &g.b, full, c0, c1, blocks);
                              }
                            });
    }
  }
}

// ----- multiply-accumulate -----

// NOTE: an arrival per warp: a wait tells of the products of the warp that waits.
template <int BLOCK_N>
__device__ __forceinline__ void release(const GemmArguments& g, GemmShared<BLOCK_N>& shared, int stage) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < g.cluster) sm90::barrier_arrive_cluster(&shared.empty[stage], lane);
}

template <class T, int BLOCK_N, bool kTransA, bool kTransB>
__device__ __forceinline__ void multiply(const GemmArguments& g, GemmShared<BLOCK_N>& shared, int warpgroup, Range steps,
                                         Ring<GemmShared<BLOCK_N>::kStages>& ring, float (&acc)[BLOCK_N / 2]) {
  constexpr uint32_t kStepA = kTransA ? kWgmmaK * kRowBytes : kWgmmaK * 2;
  constexpr uint32_t kStepB = kTransB ? kWgmmaK * kRowBytes : kWgmmaK * 2;
  int before = 0;  // the stage of the step before
  for (int step = steps.begin; step < steps.end; ++step, ring.advance()) {
    const uint8_t* const rows = shared.a[ring.stage] + warpgroup * kWarpgroupRows * kRowBytes;
    const uint64_t a = descriptor(sm90::shared_address(rows), kBoxBytes, kAtomBytes);
    const uint64_t b = descriptor(sm90::shared_address(shared.b[ring.stage]), kBoxBytes, kAtomBytes);
    sm90::barrier_wait(&shared.full[ring.stage], ring.parity);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / kWgmmaK; ++k) {
      sm90::wgmma<T, BLOCK_N, kTransA, kTransB>(acc, a + descriptor_step(k * kStepA), b + descriptor_step(k * kStepB),
                                                step > steps.begin || k > 0);
    }
    sm90::wgmma_commit();
    if (step > steps.begin) {
      sm90::wgmma_wait<1>();
      release(g, shared, before);
    }
    before = ring.stage;
  }
  sm90::wgmma_wait_all(acc);
  release(g, shared, before);
}

// ----- epilogue -----

template <class T>
__device__ __forceinline__ float element(const char* data, int64_t i) {
  Elements<T, 1> one;
  load<LoadReadOnly>(reinterpret_cast<const T*>(data) + i, one);
  return convert<float>(one.at[0]);
}

__device__ __forceinline__ float bias_at(const GemmArguments& g, int column) {
  if (g.bias == nullptr || column >= g.columns) return 0;
  const int64_t i = column * g.bias_stride;
  if (g.bias_dtype == ScalarType::Half) return element<Half>(g.bias, i);
  if (g.bias_dtype == ScalarType::BFloat16) return element<BFloat16>(g.bias, i);
  if (g.bias_dtype == ScalarType::Float) return element<float>(g.bias, i);
  return element<double>(g.bias, i);
}

// Each lane of a quad has bits of four words; lane q gets word q with the bits of all.
__device__ __forceinline__ uint32_t gather_word(const uint32_t (&words)[4], int q) {
  const bool high = q & 2, odd = q & 1;
  uint32_t mine[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mine[i] = (high ? words[2 + i] : words[i]) | sm90::shuffle_xor(high ? words[i] : words[2 + i], 2);
  }
  return (odd ? mine[1] : mine[0]) | sm90::shuffle_xor(odd ? mine[0] : mine[1], 1);
}

// What a thread of a warpgroup that multiplies knows of itself.
struct Place {
  int warpgroup, thread, warp, lane, q;

  __device__ Place()
      : warpgroup(static_cast<int>(threadIdx.x) / kWarpgroup - 1),
        thread(static_cast<int>(threadIdx.x) % kWarpgroup),
        warp(thread / 32),
        lane(thread % 32),
        q(lane % 4) {}

  __device__ void sync() const { sm90::named_barrier_sync(1 + warpgroup, kWarpgroup); }
};

// A chunk of the accumulator: 64 rows x kChunk columns of the warpgroup, 32 values of a thread, as acc_index counts them.
struct Chunk {
  float at[kChunk / 2];
};

// Bits of the mask from the rounded output, and the output in `packed` where it is 16-bit.
template <class Out>
struct Stored {
  static constexpr bool kPacked = sizeof(Out) == 2;
  uint32_t packed[kPacked ? kChunk / 4 : 1];

  __device__ void round(Chunk& chunk, bool relu) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; i += 2) {
      float &lo = chunk.at[i], &hi = chunk.at[i + 1];
      if constexpr (kPacked) {
        packed[i / 2] = relu ? sm90::pack_relu<Out>(lo, hi) : sm90::pack<Out>(lo, hi);
      } else if (relu) {
        lo = sm90::relu(lo);
        hi = sm90::relu(hi);
      }
    }
  }

  // Of the pair that starts at value i.
  __device__ uint32_t nonzero(const Chunk& chunk, int i) const {
    if constexpr (kPacked) return nonzero_pair(packed[i / 2]);
    return static_cast<uint32_t>(!(chunk.at[i] <= 0)) | static_cast<uint32_t>(!(chunk.at[i + 1] <= 0)) << 1;
  }

  // Into the staging memory, as the boxes of the output's map: 128 bytes of columns each.
  __device__ void write(uint8_t* staging, const Chunk& chunk, const Place& at) const {
#pragma unroll
    for (int j = 0; j < kChunk / 8; j += 2) {
      if constexpr (kPacked) {
        const int row = at.warp * 16 + at.lane % 16;
        const int i = acc_index(j, 0) / 2;
        sm90::stmatrix_x4(staging + swizzled(row, j + at.lane / 16), packed[i], packed[i + 1], packed[i + 2], packed[i + 3]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = acc_row(at.thread, k % 2), column = acc_column(at.thread, j + k / 2), i = acc_index(j + k / 2, k % 2);
          uint8_t* const box = staging + column / 32 * kBoxBytes;
          sm90::store_shared(box + swizzled(row, column % 32 / 4) + column % 4 * 4, chunk.at[i], chunk.at[i + 1]);
        }
      }
    }
  }
};

template <class Out>
__device__ __forceinline__ void write_mask(const GemmArguments& g, const Stored<Out>& stored, const Chunk& chunk,
                                           const Place& at, int row, int column) {
  uint32_t words[4] = {};  // of the two rows and the two words of the chunk
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words[2 * half + j / 4] |= stored.nonzero(chunk, acc_index(j, half)) << (acc_column(at.thread, j) % 32);
    }
  }
  const uint32_t word = gather_word(words, at.q);
  row += acc_row(at.thread, at.q / 2);
  column += at.q % 2 * 32;
  if (row < g.rows && column < g.columns) {
    __stcs(g.mask + row * g.mask_pitch + column / 32, word & word_bits(g.columns - column));
  }
}

// The words of the mask of the layer below for one row of a tile; all bits where there is none, no bit outside of the matrix.
template <int kWords>
__device__ __forceinline__ void read_mask(const GemmArguments& g, int row, int column, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = row < g.rows && column + 32 * i < g.columns;
    words[i] = !inside ? 0 : g.mask == nullptr ? ~0u : __ldg(g.mask + row * g.mask_pitch + column / 32 + i);
  }
}

// Of 2 kCount sums that two lanes both have a part of, each keeps kCount and gives the rest away.
template <int kCount>
__device__ __forceinline__ void share_sums(float* sum, int lane, int distance) {
  const bool high = lane & distance;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float kept = high ? sum[kCount + i] : sum[i], given = high ? sum[i] : sum[kCount + i];
    sum[i] = kept + sm90::shuffle_xor(given, distance);
  }
}

// Sums of the chunk's columns over the 16 rows of each warp, 64 of a warp below those of the warp before.
__device__ __forceinline__ void sum_columns(const Chunk& chunk, const Place& at, float* sums) {
  float sum[kChunk / 4];  // of column 8 (i / 2) + 2 q + i % 2
#pragma unroll
  for (int i = 0; i < kChunk / 4; ++i) sum[i] = chunk.at[i / 2 * 4 + i % 2] + chunk.at[i / 2 * 4 + 2 + i % 2];
  share_sums<8>(sum, at.lane, 16);
  share_sums<4>(sum, at.lane, 8);
  share_sums<2>(sum, at.lane, 4);
  const int j = (at.lane & 16 ? 4 : 0) + (at.lane & 8 ? 2 : 0) + (at.lane & 4 ? 1 : 0);
  float* const to = sums + at.warp * kChunk + acc_column(at.thread, j);
  to[0] = sum[0];
  to[1] = sum[1];
}

template <Role kRole, class T, class Out, int BLOCK_N>
__device__ void multiply_tiles(const GemmArguments& g, GemmShared<BLOCK_N>& shared) {
  constexpr bool kTransA = kRole == Role::kWgrad, kTransB = kRole != Role::kFprop;
  constexpr int kBoxes = kChunk * sizeof(Out) / kRowBytes;        // of a chunk
  constexpr int kBuffers = kStagingBytes / (kBoxes * kBoxBytes);  // chunks that are staged at once
  constexpr int kWords = kRole == Role::kDgrad ? BLOCK_N / 32 : 1;
  const Place at;
  float* const scalars = shared.scalars[at.warpgroup];
  Ring<GemmShared<BLOCK_N>::kStages> ring;
  Schedule<BLOCK_N> schedule(g);
  float acc[BLOCK_N / 2];
  for (Work work; schedule.next(work);) {
    const int first_row = at.warpgroup * kWarpgroupRows;

    // what the epilogue needs, before the products
    [[maybe_unused]] uint32_t words[2][kWords];
    if constexpr (kRole == Role::kFprop) {
      for (int i = at.thread; i < BLOCK_N; i += kWarpgroup) scalars[i] = bias_at(g, work.column + i);
    }
    if constexpr (kRole == Role::kDgrad) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        read_mask(g, work.row + first_row + acc_row(at.thread, half), work.column, words[half]);
      }
    }

    multiply<T, BLOCK_N, kTransA, kTransB>(g, shared, at.warpgroup, work.steps, ring, acc);

    // epilogue / store, a chunk of columns at a time
#pragma unroll
    for (int c = 0; c < BLOCK_N / kChunk; ++c) {
      uint8_t* const staging = shared.staging[at.warpgroup] + c % kBuffers * kBoxes * kBoxBytes;
      const int column = work.column + c * kChunk;
      if (at.thread == 0) sm90::tma_store_wait_read<kBuffers - 1>();
      at.sync();  // the staging memory is free, and the bias is there

      Chunk chunk;
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        chunk.at[i] = acc[c * kChunk / 2 + i];
        const int j = i / 4, half = i / 2 % 2;
        if constexpr (kRole == Role::kFprop) chunk.at[i] += scalars[c * kChunk + acc_column(at.thread, j) + i % 2];
        if constexpr (kRole == Role::kDgrad) {
          const uint32_t bit = words[half][c * 2 + j / 4] >> (acc_column(at.thread, j) % 32 + i % 2) & 1;
          chunk.at[i] = bit ? chunk.at[i] : 0;
        }
      }
      Stored<Out> stored;
      stored.round(chunk, kRole == Role::kFprop && g.relu);
      stored.write(staging, chunk, at);
      if constexpr (kRole == Role::kFprop) {
        if (g.mask != nullptr) write_mask(g, stored, chunk, at, work.row + first_row, column);
      }
      if constexpr (kRole == Role::kDgrad) {
        if (g.column_sums != nullptr) sum_columns(chunk, at, scalars);
      }

      sm90::fence_proxy_async();
      at.sync();  // the chunk is staged
      if (at.thread == 0) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          sm90::tma_store(&g.out, staging + box * kBoxBytes, column + box * kChunk / kBoxes, work.out_row + first_row);
        }
        sm90::tma_store_commit();
      }
      if constexpr (kRole == Role::kDgrad) {
        const int row = work.row + first_row;
        if (g.column_sums != nullptr && at.thread < kChunk && row < g.rows && column + at.thread < g.columns) {
          float sum = 0;
          for (int warp = 0; warp < 4; ++warp) sum += scalars[warp * kChunk + at.thread];
          __stcs(g.column_sums + row / kWarpgroupRows * static_cast<int64_t>(g.columns) + column + at.thread, sum);
        }
      }
    }
  }
  if (at.thread == 0) sm90::tma_store_wait<0>();
}

#endif  // sm_90a or the host

template <Role kRole, class T, class Out, int BLOCK_N>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_kernel(MPK_GRID_CONSTANT(GemmArguments) g) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = *reinterpret_cast<GemmShared<BLOCK_N>*>(sm90::dynamic_shared());

  // barriers
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < GemmShared<BLOCK_N>::kStages; ++stage) {
      sm90::barrier_init(&shared.full[stage], 1);
      sm90::barrier_init(&shared.empty[stage], kMultiplyingWarpgroups * kWarpgroup / 32 * g.cluster);
    }
    sm90::fence_barrier_init();
  }
  sm90::cluster_arrive_relaxed();
  sm90::cluster_wait();

  if (threadIdx.x < kWarpgroup) {
    sm90::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) load_tiles<BLOCK_N, kRole == Role::kWgrad, kRole != Role::kFprop>(g, shared);
  } else {
    sm90::setmaxnreg_inc<232>();
    multiply_tiles<kRole, T, Out, BLOCK_N>(g, shared);
  }

  // A block stays until the other one has done with its barriers and its memory.
  sm90::cluster_arrive();
  sm90::cluster_wait();
#endif
}

}  // namespace mpk
