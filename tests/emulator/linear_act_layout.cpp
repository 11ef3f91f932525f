// SPDX-License-Identifier: Apache-2.0
// csrc/linear_act/sm90/layout.h as C functions, for tests/ops/linear_act/test_sm90_layout.py.

#include "linear_act/sm90/layout.h"

extern "C" {

uint32_t layout_swizzled(uint32_t row, uint32_t chunk) { return mpk::swizzled(row, chunk); }

uint64_t layout_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return mpk::descriptor(address, leading, stride);
}

uint64_t layout_descriptor_step(uint32_t bytes) { return mpk::descriptor_step(bytes); }

void layout_acc(int thread, int j, int half, int* at) {
  at[0] = mpk::acc_row(thread, half);
  at[1] = mpk::acc_column(thread, j);
  at[2] = mpk::acc_index(j, half);
}

uint32_t layout_word_bits(int64_t left) { return mpk::word_bits(left); }

void layout_grouped_tile(int index, int rows, int columns, int group, int* at) {
  const mpk::TileCoord tile = mpk::grouped_tile(index, rows, columns, group);
  at[0] = tile.row;
  at[1] = tile.column;
}

void layout_share_of_b(int block_n, int transposed, int cluster, int rank, int* range) {
  const mpk::Range found = mpk::share_of_b(block_n, transposed, cluster, rank);
  range[0] = found.begin;
  range[1] = found.end;
}

void layout_split_range(int k_blocks, int split, int splits, int* range) {
  const mpk::Range found = mpk::split_range(k_blocks, split, splits);
  range[0] = found.begin;
  range[1] = found.end;
}
}
