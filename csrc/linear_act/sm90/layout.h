// SPDX-License-Identifier: Apache-2.0
// Address arithmetic of the sm_90a GEMM: swizzled shared memory, WGMMA descriptors and accumulator fragments, words of the ReLU
// mask, tile order. Every other file of sm90/ computes its coordinates with these.
//
// Plain arithmetic on the host and the device; tests/ops/linear_act/test_sm90_layout.py checks it against definitions.

#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mpk {

MPK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ----- shared memory -----

constexpr int kRowBytes = 128;             // of a TMA box, and the width of the swizzle
constexpr int kAtomBytes = 8 * kRowBytes;  // eight rows, after which the swizzle repeats

// Where TMA puts 16-byte chunk `chunk` (0 to 7) of row `row` of a box that starts at a multiple of kAtomBytes.
MPK_HOST_DEVICE constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ (row % 8)) * 16);
}

// A WGMMA operand in shared memory with the 128-byte swizzle. K-major: `stride_bytes` from one group of eight rows to the next,
// `leading_bytes` is ignored. MN-major: `leading_bytes` from one group of 64 elements of M or N to the next, `stride_bytes`
// from one group of eight elements of K to the next. Source: PTX ISA, "Matrix descriptor" of wgmma.
MPK_HOST_DEVICE constexpr uint64_t descriptor(uint32_t shared_address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128 << 62;
}

// Added to a descriptor, it advances the operand's start by `bytes`.
MPK_HOST_DEVICE constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// ----- the accumulator of a warpgroup, 64 rows -----

// Coordinates of value 4 j + 2 half + i of thread `thread` of the warpgroup.
MPK_HOST_DEVICE constexpr int acc_row(int thread, int half) { return thread / 32 * 16 + 8 * half + thread % 32 / 4; }
MPK_HOST_DEVICE constexpr int acc_column(int thread, int j) { return 8 * j + 2 * (thread % 4); }  // plus i
MPK_HOST_DEVICE constexpr int acc_index(int j, int half) { return 4 * j + 2 * half; }

// ----- the mask: bit j of word w of a row is column 32 w + j -----

// The bits of a word that lie inside the matrix, which has `left` columns from the word's first on.
MPK_HOST_DEVICE constexpr uint32_t word_bits(int64_t left) {
  return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << static_cast<uint32_t>(left)) - 1u;
}

// ----- tiles -----

struct TileCoord {
  int row, column;
};

// Tile `index` of a grid of rows x columns tiles: bands of `group` rows (the last may be lower), each traversed column by
// column, so that the tiles in flight at one time share their operands in L2.
MPK_HOST_DEVICE constexpr TileCoord grouped_tile(int index, int rows, int columns, int group) {
  const int band = index / (group * columns), within = index % (group * columns);
  const int first = band * group, height = rows - first < group ? rows - first : group;
  return {first + within % height, within / height};
}

struct Range {
  int begin, end;
};

// The columns of a tile of b that a block of the cluster loads: even parts where a box has as many columns as the part, whole
// boxes of 64 columns, the first block the larger part, where b is transposed.
MPK_HOST_DEVICE constexpr Range share_of_b(int block_n, bool transposed, int cluster, int rank) {
  const int part = transposed ? static_cast<int>(ceil_div(block_n / 64, cluster)) * 64 : block_n / cluster;
  return {rank * part, (rank + 1) * part < block_n ? (rank + 1) * part : block_n};
}

// The k-blocks of split `split` of `splits`: consecutive, covering all, their counts differing by at most one.
MPK_HOST_DEVICE constexpr Range split_range(int k_blocks, int split, int splits) {
  return {static_cast<int>(static_cast<int64_t>(k_blocks) * split / splits),
          static_cast<int>(static_cast<int64_t>(k_blocks) * (split + 1) / splits)};
}

}  // namespace mpk
