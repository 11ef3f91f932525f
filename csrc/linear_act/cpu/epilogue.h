// SPDX-License-Identifier: Apache-2.0
// The epilogue of the CPU GEMM: scales of the operands, bias, the saved preactivation, activation, the one rounding, or the sum
// of earlier results, of a block of accumulators.

#pragma once

#include <optional>

#include "../../common/cast.h"
#include "../../common/check.h"
#include "../../common/clones.h"
#include "../activation.h"

namespace mpk {
namespace {

MPK_CLONES void add(float* z, const float* other, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] += other[i];
}

MPK_CLONES void scale(float* z, float by, const float* by_column, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = z[i] * by * by_column[i];
}

// A number in fp32 for each of `rows` rows of an operand; null where it has none.
const float* scales_of(const std::optional<Tensor>& scales, int64_t rows) {
  if (!scales) return nullptr;
  STD_TORCH_CHECK(scales->is_cpu() && scales->scalar_type() == ScalarType::Float && scales->dim() == 1 &&
                      scales->size(0) == rows && scales->is_contiguous(),
                  "scales must be contiguous, fp32 and as many as rows of an operand");
  return static_cast<const float*>(scales->const_data_ptr());
}

class Output {
 public:
  // saved: receives the preactivation. a_scale, b_scale: both or neither.
  explicit Output(const Tensor& out, const std::optional<Tensor>& bias = std::nullopt, int64_t activation = 0,
                  const std::optional<Tensor>& saved = std::nullopt, const std::optional<Tensor>& a_scale = std::nullopt,
                  const std::optional<Tensor>& b_scale = std::nullopt)
      : rows_(out.size(0)),
        pitch_(out.size(1)),
        data_(static_cast<char*>(out.mutable_data_ptr())),
        size_(size_of(out.scalar_type())),
        round_(find_cast(ScalarType::Float, out.scalar_type())),
        activate_(activation_loops(activation).activate) {
    STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.is_contiguous(), "out must be a contiguous matrix");
    STD_TORCH_CHECK(a_scale.has_value() == b_scale.has_value(), "both operands have scales or neither has");
    a_scale_ = scales_of(a_scale, out.size(0));
    b_scale_ = scales_of(b_scale, out.size(1));
    if (saved) {
      STD_TORCH_CHECK(saved->is_cpu() && saved->dim() == 2 && saved->size(0) == out.size(0) && saved->size(1) == out.size(1) &&
                          saved->is_contiguous(),
                      "saved must be a contiguous matrix as large as out");
      saved_ = static_cast<char*>(saved->mutable_data_ptr());
      saved_size_ = size_of(saved->scalar_type());
      round_saved_ = find_cast(ScalarType::Float, saved->scalar_type());
    }
    if (!bias) return;
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == out.size(1) && bias->is_contiguous(),
                    "bias must be contiguous and as long as a row of out");
    bias_ = static_cast<const char*>(bias->const_data_ptr());
    bias_size_ = size_of(bias->scalar_type());
    widen_bias_ = find_cast(bias->scalar_type(), ScalarType::Float);
  }

  // The same for a result that is added to what is in `out`.
  static Output sum(const Tensor& out) {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "what is added to must be fp32");
    Output result(out);
    result.adds_ = true;
    return result;
  }

  bool has_size(int64_t rows, int64_t columns) const { return rows_ == rows && pitch_ == columns; }

  // out[row + i, column + j] = round(act(acc[i * pitch + j] * a_scale[row + i] * b_scale[column + j] + bias[column + j])).
  // Overwrites acc; scratch: `columns` elements.
  void finish(int64_t row, int64_t column, int64_t rows, int64_t columns, float* acc, int64_t pitch, float* scratch) const {
    if (bias_ != nullptr) widen_bias_(bias_ + column * bias_size_, scratch, columns);
    for (int64_t i = 0; i < rows; ++i) {
      float* z = acc + i * pitch;
      if (a_scale_ != nullptr) scale(z, a_scale_[row + i], b_scale_ + column, columns);
      if (bias_ != nullptr) add(z, scratch, columns);
      const int64_t at = (row + i) * pitch_ + column;
      if (saved_ != nullptr) round_saved_(z, saved_ + at * saved_size_, columns);  // round: fp32 -> saved
      if (activate_ != nullptr) activate_(z, columns);
      if (adds_) add(z, reinterpret_cast<const float*>(data_) + at, columns);
      round_(z, data_ + at * size_, columns);  // round: fp32 -> out
    }
  }

 private:
  int64_t rows_, pitch_;
  char* data_;
  int64_t size_;
  Cast round_;
  bool adds_ = false;
  void (*activate_)(float* z, int64_t n);
  char* saved_ = nullptr;
  int64_t saved_size_ = 0;
  Cast round_saved_ = nullptr;
  const char* bias_ = nullptr;
  int64_t bias_size_ = 0;
  Cast widen_bias_ = nullptr;
  const float *a_scale_ = nullptr, *b_scale_ = nullptr;
};

}  // namespace
}  // namespace mpk
