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

// A tensor that is read or written as fp32: rows without gaps, or a single one. Or null.
class AsFloat {
 public:
  static AsFloat read(const std::optional<Tensor>& tensor) {
    return tensor ? AsFloat(*tensor, find_cast(tensor->scalar_type(), ScalarType::Float)) : AsFloat();
  }
  static AsFloat written(const std::optional<Tensor>& tensor) {
    return tensor ? AsFloat(*tensor, find_cast(ScalarType::Float, tensor->scalar_type())) : AsFloat();
  }

  explicit operator bool() const { return data_ != nullptr; }
  char* at(int64_t row, int64_t column) const { return data_ + (row * pitch_ + column) * size_; }
  void read(int64_t row, int64_t column, float* to, int64_t n) const { cast_(at(row, column), to, n); }
  void write(const float* from, int64_t row, int64_t column, int64_t n) const { cast_(from, at(row, column), n); }

 private:
  AsFloat() = default;
  AsFloat(const Tensor& tensor, Cast cast)
      : data_(static_cast<char*>(tensor.mutable_data_ptr())),
        pitch_(tensor.dim() == 2 ? tensor.stride(0) : 0),
        size_(size_of(tensor.scalar_type())),
        cast_(cast) {}

  char* data_ = nullptr;
  int64_t pitch_ = 0, size_ = 0;
  Cast cast_ = nullptr;
};

// A number in fp32 for each of `rows` rows of an operand; null where it has none.
const float* scales_of(const std::optional<Tensor>& scales, int64_t rows) {
  if (!scales) return nullptr;
  STD_TORCH_CHECK(
      scales->scalar_type() == ScalarType::Float && scales->dim() == 1 && scales->size(0) == rows && scales->is_contiguous(),
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
        columns_(out.size(1)),
        out_(AsFloat::written(out)),
        saved_(AsFloat::written(saved)),
        bias_(AsFloat::read(bias)),
        activate_(activation_loops(activation).activate),
        a_scale_(scales_of(a_scale, rows_)),
        b_scale_(scales_of(b_scale, columns_)) {
    STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "out must be a contiguous matrix");
    STD_TORCH_CHECK(a_scale.has_value() == b_scale.has_value(), "both operands have scales or neither has");
    STD_TORCH_CHECK(
        !saved || (saved->dim() == 2 && saved->size(0) == rows_ && saved->size(1) == columns_ && saved->is_contiguous()),
        "saved must be a contiguous matrix as large as out");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == columns_ && bias->is_contiguous()),
                    "bias must be contiguous and as long as a row of out");
  }

  // The same for a result that is added to what is in `out`.
  static Output sum(const Tensor& out) {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "what is added to must be fp32");
    Output result(out);
    result.adds_ = true;
    return result;
  }

  bool has_size(int64_t rows, int64_t columns) const { return rows_ == rows && columns_ == columns; }

  // out[row + i, column + j] = round(act(acc[i * pitch + j] * a_scale[row + i] * b_scale[column + j] + bias[column + j])).
  // Overwrites acc; scratch: `columns` elements.
  void finish(int64_t row, int64_t column, int64_t rows, int64_t columns, float* acc, int64_t pitch, float* scratch) const {
    if (bias_) bias_.read(0, column, scratch, columns);
    for (int64_t i = 0; i < rows; ++i) {
      float* z = acc + i * pitch;
      if (a_scale_ != nullptr) scale(z, a_scale_[row + i], b_scale_ + column, columns);
      if (bias_) add(z, scratch, columns);
      if (saved_) saved_.write(z, row + i, column, columns);  // round: fp32 -> saved
      if (activate_ != nullptr) activate_(z, columns);
      if (adds_) add(z, reinterpret_cast<const float*>(out_.at(row + i, column)), columns);
      out_.write(z, row + i, column, columns);  // round: fp32 -> out
    }
  }

 private:
  int64_t rows_, columns_;
  AsFloat out_, saved_, bias_;
  bool adds_ = false;
  void (*activate_)(float* z, int64_t n);
  const float *a_scale_, *b_scale_;
};

}  // namespace
}  // namespace mpk
