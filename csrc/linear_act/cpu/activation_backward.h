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

// grad_z = the gradient of the preactivation; grad_bias = its column sums before rounding, first within blocks of kMC rows.
void activation_backward(const Tensor& grad_out_, const std::optional<Tensor>& saved_, int64_t activation,
                         const std::optional<Tensor>& grad_z_, const std::optional<Tensor>& grad_bias_) {
  const int64_t M = grad_out_.size(0), N = grad_out_.size(1);
  if (N == 0) return;
  const AsFloat grad_out = AsFloat::read(grad_out_), saved = AsFloat::read(saved_);
  const AsFloat grad_z = AsFloat::written(grad_z_), grad_bias = AsFloat::written(grad_bias_);
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
        grad_out.read(m, n, grad, columns);
        if (gradient != nullptr) {
          saved.read(m, n, z, columns);
          gradient(grad, z, columns);
        }
        if (grad_z) grad_z.write(grad, m, n, columns);  // round: fp32 -> grad_z
        add(block, grad, columns);
        if (m % kMC == kMC - 1 || m == M - 1) {
          add(sum, block, columns);
          std::fill_n(block, columns, 0);
        }
      }
      if (grad_bias) grad_bias.write(sum, 0, n, columns);  // round: fp32 -> grad_bias
    }
  });
}

}  // namespace
}  // namespace mpk
