// SPDX-License-Identifier: Apache-2.0
// A list of tensors as the ops are given it: a table of numbers, because unboxing a list costs 0.3 us a tensor.

#pragma once

#include "check.h"
#include "dtype.h"

namespace mpk {

// int64 (3, n) on the CPU: elements, ScalarType and address of each tensor, which the caller keeps alive. Its elements fill
// one stretch of memory, in the same order in every list of a call. mpkernels/ops/common/layout.py makes it.
class TensorList {
 public:
  TensorList(const char* name, const Tensor& table) : size_(table.dim() == 2 ? table.size(1) : -1) {
    STD_TORCH_CHECK(!table.is_cuda() && table.scalar_type() == ScalarType::Long && size_ >= 0 && table.size(0) == kRows &&
                        table.is_contiguous(),
                    name, " must be an int64 table of elements, dtypes and addresses");
    at_ = static_cast<const int64_t*>(table.const_data_ptr());
  }

  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int64_t numel(int64_t i) const { return at_[i]; }
  ScalarType dtype(int64_t i) const { return static_cast<ScalarType>(at_[size_ + i]); }
  char* data(int64_t i) const { return reinterpret_cast<char*>(at_[2 * size_ + i]); }

 private:
  static constexpr int64_t kRows = 3;
  int64_t size_;
  const int64_t* at_;
};

// As many elements in every tensor as in that of `like`; a copy that is not wanted has none.
inline void check_list(const char* name, const TensorList& tensors, const TensorList& like, bool may_be_empty = false) {
  STD_TORCH_CHECK(tensors.size() == like.size(), name, " has ", tensors.size(), " tensors, expected ", like.size());
  for (int64_t i = 0; i < like.size(); ++i) {
    const int64_t numel = tensors.numel(i);
    STD_TORCH_CHECK(numel == like.numel(i) || (may_be_empty && numel == 0), name, "[", i, "] has ", numel,
                    " elements, expected ", like.numel(i));
  }
}

// One fp32 number for each master.
inline void check_steps(const TensorList& steps, const TensorList& masters) {
  STD_TORCH_CHECK(steps.size() == masters.size(), "steps has ", steps.size(), " tensors, expected ", masters.size());
  for (int64_t i = 0; i < steps.size(); ++i) {
    STD_TORCH_CHECK(steps.numel(i) == 1 && steps.dtype(i) == ScalarType::Float, "steps[", i, "] is no fp32 number");
  }
}

// A list of the masters' dtypes or of bf16, as `first` is.
inline void check_state(const char* name, const TensorList& tensors, const TensorList& masters, const TensorList& first) {
  check_list(name, tensors, masters);
  for (int64_t i = 0; i < masters.size(); ++i) {
    const ScalarType dtype = tensors.dtype(i);
    STD_TORCH_CHECK((dtype == masters.dtype(i) || dtype == ScalarType::BFloat16) && dtype == first.dtype(i), name, "[", i,
                    "] is neither of its master's dtype nor bf16, or not as the other states");
  }
}

}  // namespace mpk
