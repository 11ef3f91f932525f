// SPDX-License-Identifier: Apache-2.0
// What a raw pointer needs to be true; what a user can get wrong is checked by the public ops in Python.

#pragma once

#include <optional>

#include "tensor.h"

namespace mpk {

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on one device with the rest");
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
