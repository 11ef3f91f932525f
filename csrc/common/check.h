// SPDX-License-Identifier: Apache-2.0
// What a raw pointer needs to be true; what a user can get wrong is checked by the public ops in Python.

#pragma once

#include <optional>

#include "tensor.h"

namespace mpk {

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on one device with the rest");
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == numel, name, " must have ", numel, " elements in one dimension");
}

// The address of a number of dtype T; null where there is none.
template <class T>
T* address_of(const std::optional<Tensor>& number) {
  return number ? number->number<T>() : nullptr;
}

}  // namespace mpk
