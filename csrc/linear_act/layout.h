// SPDX-License-Identifier: Apache-2.0
// Where things lie: swizzled shared memory, WGMMA's descriptors and fragments, words of the mask, the order of the tiles.
//
// Plain arithmetic on the host and the device; tests/ops/linear_act/test_sm90_layout.py holds it against definitions.

#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mpk {

MPK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ----- shared memory -----

constexpr int kRowBytes = 128;             // of a box of TMA, and the width of the swizzle
constexpr int kAtomBytes = 8 * kRowBytes;  // eight rows, after which the swizzle repeats

// Where TMA puts the 16 bytes number `chunk` (0 to 7) of row `row` of a box that starts at a multiple of kAtomBytes.
MPK_HOST_DEVICE constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ (row % 8)) * 16);
}

// An operand of WGMMA in shared memory with the 128-byte swizzle. Along K (not transposed): `stride_bytes` from eight rows to
// the next eight, `leading_bytes` has no meaning. Along M or N: `leading_bytes` from 64 elements to the next 64,
// `stride_bytes` from eight steps of K to the next eight. Source: PTX ISA, "Matrix descriptor" of wgmma.
MPK_HOST_DEVICE constexpr uint64_t descriptor(uint32_t shared_address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128 << 62;
}

// What is added to a descriptor whose operand starts `bytes` later.
MPK_HOST_DEVICE constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// ----- the accumulator of a warpgroup, 64 rows -----

// Of value number 4 j + 2 half + i of thread `thread` of the warpgroup.
MPK_HOST_DEVICE constexpr int acc_row(int thread, int half) { return thread / 32 * 16 + 8 * half + thread % 32 / 4; }
MPK_HOST_DEVICE constexpr int acc_column(int thread, int j) { return 8 * j + 2 * (thread % 4); }  // i to the right of it
MPK_HOST_DEVICE constexpr int acc_index(int j, int half) { return 4 * j + 2 * half; }

// ----- the mask: bit j of word w of a row is column 32 w + j -----

// Bits 0 and 1: whether the low and the high one of two packed 16-bit values are other than 0, NaN included.
MPK_HOST_DEVICE constexpr uint32_t nonzero_pair(uint32_t packed) {
  const uint32_t carried = (packed & 0x7fff7fffu) + 0x7fff7fffu;  // into the sign bits
  return (carried >> 15 & 1u) | (carried >> 30 & 2u);
}

// The bits of a word that are columns of the matrix, of which `left` are at and after the word's first.
MPK_HOST_DEVICE constexpr uint32_t word_bits(int64_t left) {
  return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << static_cast<uint32_t>(left)) - 1u;
}

// ----- tiles -----

struct TileAt {
  int row, column;
};

// Tile number `index` of rows x columns: bands of `group` rows, the last one of what is left, each column by column, so that
// the tiles under way together share their operands in the cache.
MPK_HOST_DEVICE constexpr TileAt grouped_tile(int index, int rows, int columns, int group) {
  const int band = index / (group * columns), within = index % (group * columns);
  const int first = band * group, height = rows - first < group ? rows - first : group;
  return {first + within % height, within / height};
}

struct Range {
  int begin, end;
};

// The steps that part number `part` of `parts` does: consecutive, all of them, and as many as another or one more.
MPK_HOST_DEVICE constexpr Range part_of(int steps, int part, int parts) {
  return {static_cast<int>(static_cast<int64_t>(steps) * part / parts),
          static_cast<int>(static_cast<int64_t>(steps) * (part + 1) / parts)};
}

}  // namespace mpk
