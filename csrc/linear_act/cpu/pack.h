// SPDX-License-Identifier: Apache-2.0
// Packing for the CPU GEMM: a view of an operand in any layout, scratch memory of a thread, and the copies of a block of a and
// of a panel of b that the micro-kernels read: fp32, or VNNI words for the bf16 dot-product.

#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "../../common/check.h"
#include "dispatch.h"
#include "vnni.h"

namespace mpk {
namespace {

// Cache blocking, by the names of GotoBLAS: a k-block of a panel of b stays in L1, a block of a and its accumulators in L2.
constexpr int64_t kMC = 192, kNC = 256, kKC = 256;
constexpr int64_t kVnniMC = 256;  // rows of words, which are half as long

// ----- operands -----

// Sizes and strides in elements; one of the two dimensions has stride 1.
struct Matrix {
  Matrix(const char* name, const Tensor& tensor, ScalarType compute, const IsaKernels& isa)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        rows(tensor.size(0)),
        columns(tensor.size(1)),
        row_stride(rows <= 1 ? 1 : tensor.stride(0)),
        column_stride(columns <= 1 ? 1 : tensor.stride(1)),
        kernels(&isa.micro_kernels(compute, tensor.scalar_type())),
        size(size_of(tensor.scalar_type())) {
    const ScalarType from = tensor.scalar_type();
    const bool is_half = compute == ScalarType::Half || compute == ScalarType::BFloat16;
    STD_TORCH_CHECK(is_half || is_float8(compute) || compute == ScalarType::Float,
                    "compute_dtype must be float16, bfloat16, float32 or an 8-bit float");
    const bool widens = from == compute || (compute == ScalarType::Float && size == 2);
    const bool fits = is_float8(compute) ? is_float8(from) : widens || from == ScalarType::Float;
    STD_TORCH_CHECK(tensor.dim() == 2 && fits, name, " must be a matrix in the compute dtype or fp32");
    STD_TORCH_CHECK(row_stride == 1 || column_stride == 1, name, " must have rows or columns without gaps");
  }

  Matrix transposed() const {
    Matrix other = *this;
    std::swap(other.rows, other.columns);
    std::swap(other.row_stride, other.column_stride);
    return other;
  }

  // Whether a row of bf16 is a row of VNNI words as it lies, which can be read as fp32.
  bool has_vnni_rows() const { return size == 2 && column_stride == 1 && row_stride % 2 == 0; }

  // Whether the two elements of a word lie in neighboring columns, each contiguous.
  bool has_bf16_columns() const { return size == 2 && row_stride == 1; }

  // The matrix of VNNI words, which `copies`, those of fp32, move unchanged.
  Matrix as_words(const MicroKernels& copies) const {
    Matrix other = *this;
    other.columns /= 2;
    other.row_stride /= 2;
    other.size = 4;
    other.kernels = &copies;
    return other;
  }

  const char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column * column_stride) * size; }

  // to[i * pitch + j] = element (row + i, column + j).
  void widen(int64_t row, int64_t column, int64_t count, int64_t length, float* to, int64_t pitch) const {
    if (column_stride == 1)
      kernels->rows(at(row, column), row_stride, count, length, to, pitch);
    else
      kernels->transposed(at(row, column), column_stride, length, count, to, pitch);
  }

  // to[j * pitch + i] = element (row + i, column + j).
  void widen_transposed(int64_t row, int64_t column, int64_t count, int64_t length, float* to, int64_t pitch) const {
    transposed().widen(column, row, length, count, to, pitch);
  }

  const char* data;
  int64_t rows, columns, row_stride, column_stride;
  const MicroKernels* kernels;
  int64_t size;
};

// ----- scratch memory -----

// One per thread, reused: fresh memory costs page faults.
struct Scratch {
  static constexpr int64_t kPitch = kKC + 16;  // rows at a power of 2 would compete for the same cache sets
  alignas(64) float a[(kVnniMC + 16) * kPitch];
  alignas(64) float panel[kKC * 32];
  alignas(64) float acc[(kVnniMC + 16) * kNC];
  alignas(64) float bias[kNC];

  static constexpr int64_t kVnniPitch = kKC / 2 + kVnniStep;
  alignas(64) float vnni_a[(kVnniMC + 16) * kVnniPitch];
  alignas(64) float vnni_panel[kKC / 2 * kVnniNR];
};
static_assert(kKC % (2 * kVnniStep) == 0 && kKC / 2 <= Scratch::kPitch);

Scratch& thread_scratch() {
  static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
  return *scratch;
}

// ----- VNNI packing; both return the smallest nonzero magnitude -----

// Elements [k, k + K) of rows of a into `vnni_a`, row by row, zero-padded.
uint16_t pack_vnni_a(const IsaKernels& isa, const Matrix& a, int64_t row, int64_t k, int64_t rows, int64_t K,
                     Scratch& scratch) {
  const int64_t words = (K + 1) / 2;
  const MicroKernels& copies = isa.micro_kernels(ScalarType::Float, ScalarType::Float);
  if (a.has_vnni_rows() && K % 2 == 0) {
    a.as_words(copies).widen(row, k / 2, rows, words, scratch.vnni_a, Scratch::kVnniPitch);
  } else if (a.has_bf16_columns() && K % 2 == 0) {
    constexpr int64_t kColumnPitch = kVnniMC + 16;
    interleave_rows(a.at(row, k), a.column_stride, words, rows, scratch.a, kColumnPitch);
    copies.transposed(scratch.a, kColumnPitch, words, rows, scratch.vnni_a, Scratch::kVnniPitch);
  } else {
    a.widen(row, k, rows, K, scratch.a, Scratch::kPitch);
    vnni_rows(scratch.a, Scratch::kPitch, rows, K, scratch.vnni_a, Scratch::kVnniPitch);
  }
  uint16_t least = kAllZero;
  for (int64_t i = 0; i < rows; ++i) {
    float* to = scratch.vnni_a + i * Scratch::kVnniPitch;
    std::fill(to + words, to + padded_words(words), 0);
    least = std::min(least, min_nonzero_magnitude(to, 2 * words));
  }
  return least;
}

// The same elements of rows of b, which become columns of `vnni_panel`; its other columns are zero.
uint16_t pack_vnni_panel(const IsaKernels& isa, const Matrix& b, int64_t row, int64_t k, int64_t rows, int64_t K,
                         Scratch& scratch) {
  const int64_t words = (K + 1) / 2;
  float* to = scratch.vnni_panel;
  if (rows < kVnniNR) std::fill_n(to, words * kVnniNR, 0);
  if (b.has_vnni_rows() && K % 2 == 0) {
    b.as_words(isa.micro_kernels(ScalarType::Float, ScalarType::Float)).widen_transposed(row, k / 2, rows, words, to, kVnniNR);
  } else if (b.has_bf16_columns() && K % 2 == 0) {
    interleave_rows(b.at(row, k), b.column_stride, words, rows, to, kVnniNR);
  } else {
    b.widen_transposed(row, k, rows, K, scratch.panel, kVnniNR);
    vnni_panel(scratch.panel, rows, K, to);
  }
  std::fill(to + words * kVnniNR, to + padded_words(words) * kVnniNR, 0);
  return min_nonzero_magnitude(to, 2 * words * kVnniNR);
}

}  // namespace
}  // namespace mpk
