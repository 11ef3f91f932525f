// SPDX-License-Identifier: Apache-2.0
// The tensor map, TMA's description of a matrix: address, sizes, pitch, and the box that one instruction copies.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace mpk {

// The bytes of a CUtensorMap: a part of a kernel's __grid_constant__ parameter.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// `rows` x `columns` elements, fp16, bf16 or fp32, at a multiple of 16 bytes; `pitch` elements, a multiple of 16 bytes, from
// one row to the next. A box is `box_rows` (at most 256) rows of 128 bytes, and lies in shared memory with the 128-byte
// swizzle: 16-byte chunk c of row r at 128 r + 16 (c ^ r % 8). Elements outside of the matrix are read as 0.
TensorMap encode_tensor_map(const void* data, torch::headeronly::ScalarType dtype, int64_t rows, int64_t columns, int64_t pitch,
                            int box_rows);

}  // namespace mpk
