// SPDX-License-Identifier: Apache-2.0
// adamw_ on the CPU: one parallel region over all tensors, every byte read and written once.

#include <torch/csrc/stable/library.h>

#include "../common/clones.h"
#include "../common/runs.h"
#include "../common/update.h"
#include "update.h"

namespace mpk {
namespace {

struct AdamwTensor {
  GradAndCopy io;
  bool is_double;
  void *master, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
};

template <class T, bool kMax, bool kAddsDecay>
MPK_CLONES void adamw_block(const AdamwScalars<T>& scalars, const T* __restrict__ grad, T* __restrict__ w, T* __restrict__ m,
                            T* __restrict__ v, T* __restrict__ vmax, int64_t n) {
  const AdamwScalars<T> s = scalars;
  for (int64_t i = 0; i < n; ++i) adamw_element<T, kMax, kAddsDecay>(s, grad[i], w[i], m[i], v[i], kMax ? vmax + i : nullptr);
}

template <class T>
auto find_block(bool has_max, bool adds_decay) {
  if (has_max) return adds_decay ? adamw_block<T, true, true> : adamw_block<T, true, false>;
  return adds_decay ? adamw_block<T, false, true> : adamw_block<T, false, false>;
}

template <class T>
void adamw_run(const AdamwTensor& tensor, const AdamwOptions& options, double factor, int64_t t, int64_t begin, int64_t end) {
  const AdamwScalars<T> scalars(options, factor, t);
  T *w = static_cast<T*>(tensor.master), *m = static_cast<T*>(tensor.exp_avg), *v = static_cast<T*>(tensor.exp_avg_sq);
  T* vmax = static_cast<T*>(tensor.max_exp_avg_sq);
  const auto block = find_block<T>(vmax != nullptr, options.adds_decay());
  update_run<T>(tensor.io, w, begin, end, [&](const T* grad, int64_t i, int64_t n) {
    block(scalars, grad, w + i, m + i, v + i, vmax == nullptr ? nullptr : vmax + i, n);
  });
}

// Whether the step was taken.
bool adamw_(Tensors masters, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors copies,
            Tensor steps, Tensor lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
            std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> grad_norm,
            std::optional<double> max_norm) {
  check_list("grads", grads, masters);
  check_list("copies", copies, masters, /*may_be_empty=*/true);
  check_state("exp_avgs", exp_avgs, masters);
  check_state("exp_avg_sqs", exp_avg_sqs, masters);
  check_state("max_exp_avg_sqs", max_exp_avg_sqs, masters);
  const Step step = read_step(grad_scale, found_inf, grad_norm, max_norm, maximize);
  if (!step.taken) return false;

  const AdamwOptions options{real_value(lr), beta1, beta2, eps, weight_decay, decoupled};
  std::vector<AdamwTensor> tensors;
  tensors.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i) {
    tensors.push_back({GradAndCopy(masters[i], grads[i], copies[i]), masters[i].scalar_type() == ScalarType::Double,
                       masters[i].mutable_data_ptr(), exp_avgs[i].mutable_data_ptr(), exp_avg_sqs[i].mutable_data_ptr(),
                       max_exp_avg_sqs.empty() ? nullptr : max_exp_avg_sqs[i].mutable_data_ptr()});
  }
  StepCounts counts(steps);
  Runs(masters).parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const auto run = tensors[i].is_double ? adamw_run<double> : adamw_run<float>;
    run(tensors[i], options, step.factor, counts[i] + 1, begin, end);
  });
  counts.advance();
  return true;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CPU, m) { m.impl("adamw_", TORCH_BOX(&mpk::adamw_)); }
