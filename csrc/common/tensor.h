// SPDX-License-Identifier: Apache-2.0
// What the native ops know of a torch.Tensor: its address, sizes, strides, dtype and device. Nothing is held: the caller keeps
// the tensor alive and as it is.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace mpk {

using torch::headeronly::ScalarType;

class Tensor {
 public:
  // sizes and strides: those of the torch.Tensor itself, in elements.
  Tensor(void* data, int32_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype, bool is_cuda, int32_t device)
      : data_(data), sizes_(sizes), strides_(strides), dim_(dim), device_(device), dtype_(dtype), is_cuda_(is_cuda) {}

  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[checked(i)]; }
  int64_t stride(int64_t i) const { return strides_[checked(i)]; }
  ScalarType scalar_type() const { return dtype_; }
  bool is_cuda() const { return is_cuda_; }
  int32_t get_device_index() const { return device_; }

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    bool has_gaps = false;
    for (int32_t i = dim_; i-- > 0;) {
      has_gaps |= sizes_[i] != 1 && strides_[i] != expected;
      expected *= sizes_[i];
    }
    return !has_gaps || expected == 0;
  }

  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }

  // Of a tensor of that dtype.
  template <class T>
  const T* const_data_ptr() const {
    return mutable_data_ptr<T>();
  }
  template <class T>
  T* mutable_data_ptr() const {
    STD_TORCH_CHECK((dtype_ == torch::headeronly::CppTypeToScalarType<T>::value),
                    "a tensor has another dtype than its op expects");
    return static_cast<T*>(data_);
  }

  // Of one number of that dtype.
  template <class T>
  T* number() const {
    STD_TORCH_CHECK(numel() == 1, "a tensor has ", numel(), " elements where its op expects one number");
    return mutable_data_ptr<T>();
  }

 private:
  int64_t checked(int64_t dimension) const {
    if (dimension >= dim_) refuse_dimension();
    return dimension;
  }

  [[noreturn]] __attribute__((noinline)) static void refuse_dimension() {  // small where it is called
    throw std::runtime_error("a tensor has fewer dimensions than its op expects");
  }

  void* data_;
  const int64_t *sizes_, *strides_;
  int32_t dim_, device_;
  ScalarType dtype_;
  bool is_cuda_;
};

}  // namespace mpk
