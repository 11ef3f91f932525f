// SPDX-License-Identifier: Apache-2.0
// What a raw pointer needs to be true; what a user can get wrong is checked by the public ops in Python.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace mpk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void check_cpu(const char* name, const Tensor& tensor) { STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU"); }

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on one device with the rest");
}

// As many elements in every tensor as in that of `like`; a copy that is not wanted has none.
inline void check_list(const char* name, const Tensors& tensors, const Tensors& like, bool may_be_empty = false) {
  STD_TORCH_CHECK(tensors.size() == like.size(), name, " has ", tensors.size(), " tensors, expected ", like.size());
  for (size_t i = 0; i < like.size(); ++i) {
    check_same_device(name, tensors[i], like[i]);
    const int64_t numel = tensors[i].numel();
    STD_TORCH_CHECK(numel == like[i].numel() || (may_be_empty && numel == 0), name, "[", i, "] has ", numel,
                    " elements, expected ", like[i].numel());
  }
}

// A list of the masters' dtypes; empty where the update does without it.
inline void check_state(const char* name, const Tensors& tensors, const Tensors& masters) {
  if (tensors.empty()) return;
  check_list(name, tensors, masters);
  for (size_t i = 0; i < masters.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].scalar_type() == masters[i].scalar_type(), name, "[", i, "] is not of its master's dtype");
  }
}

// The value of a 0-d tensor of dtype T, or nothing.
template <class T>
std::optional<T> value_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return *tensor->const_data_ptr<T>();
}

// The value of a 0-d fp32 or fp64 tensor.
inline double real_value(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  return *tensor.const_data_ptr<float>();
}

}  // namespace mpk
