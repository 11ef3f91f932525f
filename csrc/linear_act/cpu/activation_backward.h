// SPDX-License-Identifier: Apache-2.0
// The pass before the products of backward on the CPU: the gradient through the activation, and the bias gradient.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../../common/cast.h"
#include "../../common/check.h"
#include "../activation.h"
#include "epilogue.h"
#include "pack.h"
#include "partition.h"

namespace mpk {
namespace {

// A tensor that is read and written as fp32, or null.
struct Columns {
  explicit Columns(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    data = static_cast<char*>(const_cast<void*>(tensor->const_data_ptr()));
    pitch = tensor->dim() == 2 ? tensor->stride(0) : 0;
    size = size_of(tensor->scalar_type());
    widen = find_cast(tensor->scalar_type(), ScalarType::Float);
    round = find_cast(ScalarType::Float, tensor->scalar_type());
  }
  void* at(int64_t row, int64_t column) const { return data + (row * pitch + column) * size; }

  char* data = nullptr;
  int64_t pitch = 0, size = 0;
  Cast widen = nullptr, round = nullptr;
};

// grad_z = the gradient of the preactivation; grad_bias = its column sums before rounding, first within blocks of kMC rows.
void activation_backward(const Tensor& grad_out_, const std::optional<Tensor>& saved_, int64_t activation,
                         const std::optional<Tensor>& grad_z_, const std::optional<Tensor>& grad_bias_) {
  const int64_t M = grad_out_.size(0), N = grad_out_.size(1);
  if (N == 0) return;
  const Columns grad_out(grad_out_), saved(saved_), grad_z(grad_z_), grad_bias(grad_bias_);
  const auto gradient = activation_loops(activation).gradient;
  const Partition across(N, kNC, 16, threads_for(M * N, kElementsPerThread));
  const int64_t grain = kElementsPerThread / (M * across.length + 1) + 1;
  torch::stable::parallel_for(0, across.count, grain, [&](int64_t begin, int64_t end) {
    float *grad = thread_scratch().acc, *z = grad + kNC, *sum = z + kNC, *block = sum + kNC;
    for (int64_t n = begin * across.length; n < std::min(end * across.length, N); n += across.length) {
      const int64_t columns = std::min(across.length, N - n);
      std::fill_n(sum, columns, 0);
      std::fill_n(block, columns, 0);
      for (int64_t m = 0; m < M; ++m) {
        grad_out.widen(grad_out.at(m, n), grad, columns);
        if (gradient != nullptr) {
          saved.widen(saved.at(m, n), z, columns);
          gradient(grad, z, columns);
        }
        if (grad_z.data != nullptr) grad_z.round(grad, grad_z.at(m, n), columns);  // round: fp32 -> grad_z
        add(block, grad, columns);
        if (m % kMC == kMC - 1 || m == M - 1) {
          add(sum, block, columns);
          std::fill_n(block, columns, 0);
        }
      }
      if (grad_bias.data != nullptr) grad_bias.round(sum, grad_bias.at(0, n), columns);  // round: fp32 -> grad_bias
    }
  });
}

}  // namespace
}  // namespace mpk
