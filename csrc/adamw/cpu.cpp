// SPDX-License-Identifier: Apache-2.0
// adamw_ on the CPU: one parallel region over all tensors, every byte read and written once.

#include <torch/csrc/stable/library.h>

#include <limits>

#include "../common/clones.h"
#include "../common/fetch.h"
#include "../common/runs.h"
#include "../common/update.h"
#include "lists.h"
#include "update.h"

namespace mpk {
namespace {

template <class T, class S, bool kMax, bool kAddsDecay>
MPK_CLONES void adamw_block(const AdamwScalars<T>& scalars, int64_t first, const T* __restrict__ grad, T* __restrict__ w,
                            S* __restrict__ m, S* __restrict__ v, S* __restrict__ vmax, int64_t n) {
  const AdamwScalars<T> s = scalars;
  for (int64_t i = 0; i < n; ++i) {
    adamw_element<T, S, kMax, kAddsDecay>(s, first + i, grad[i], w[i], m[i], v[i], kMax ? vmax + i : nullptr);
  }
}

template <class T, class S>
auto find_block(bool has_max, bool adds_decay) {
  if (has_max) return adds_decay ? adamw_block<T, S, true, true> : adamw_block<T, S, true, false>;
  return adds_decay ? adamw_block<T, S, false, true> : adamw_block<T, S, false, false>;
}

struct AdamwTensor {
  GradAndCopy io;
  char *master, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  void (*run)(const AdamwTensor&, const AdamwOptions&, double factor, float t, int64_t begin, int64_t end);
};

// The scalars of the last piece serve the next: tensors of a call have mostly taken as many steps, and powers cost more than
// the update of a short tensor.
template <class T>
const AdamwScalars<T>& scalars_of(const AdamwOptions& options, double factor, float t) {
  struct Last {
    AdamwOptions options{};
    double factor = 0;
    float t = std::numeric_limits<float>::quiet_NaN();  // equals none
    AdamwScalars<T> scalars;
  };
  thread_local Last last;
  if (last.t != t || last.factor != factor || !(last.options == options)) {
    last = {options, factor, t, AdamwScalars<T>(options, factor, t)};
  }
  return last.scalars;
}

template <class T, class S>
void adamw_run(const AdamwTensor& tensor, const AdamwOptions& options, double factor, float t, int64_t begin, int64_t end) {
  const AdamwScalars<T>& scalars = scalars_of<T>(options, factor, t);
  T* w = reinterpret_cast<T*>(tensor.master);
  S *m = reinterpret_cast<S*>(tensor.exp_avg), *v = reinterpret_cast<S*>(tensor.exp_avg_sq);
  S* vmax = reinterpret_cast<S*>(tensor.max_exp_avg_sq);
  const auto block = find_block<T, S>(vmax != nullptr, options.adds_decay());
  update_run<T>(tensor.io, w, begin, end, [&](const T* grad, int64_t i, int64_t n) {
    if (kFetchesAhead) {
      fetch_ahead<1024>(m + i, n);
      fetch_ahead<1024>(v + i, n);
    }
    block(scalars, i, grad, w + i, m + i, v + i, vmax == nullptr ? nullptr : vmax + i, n);
  });
}

// Whether the step was taken.
bool adamw_(Tensor masters_, Tensor grads_, Tensor exp_avgs_, Tensor exp_avg_sqs_, Tensor max_exp_avg_sqs_, Tensor copies_,
            Tensor steps_, Tensor /*on*/, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
            bool decoupled, bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
            std::optional<Tensor> grad_norm, std::optional<double> max_norm) {
  const AdamwLists lists(masters_, grads_, exp_avgs_, exp_avg_sqs_, max_exp_avg_sqs_, copies_, steps_);
  const Step step = read_step(grad_scale, found_inf, grad_norm, max_norm, maximize);
  if (!step.taken) return false;

  const AdamwOptions options{real_value(lr), beta1, beta2, eps, weight_decay, decoupled};
  std::vector<AdamwTensor> tensors;
  tensors.reserve(lists.masters.size());
  for (int64_t i = 0; i < lists.masters.size(); ++i) {
    tensors.push_back(
        {GradAndCopy(lists.masters, lists.grads, lists.copies, i), lists.masters.data(i), lists.exp_avgs.data(i),
         lists.exp_avg_sqs.data(i), lists.max_exp_avg_sqs.empty() ? nullptr : lists.max_exp_avg_sqs.data(i),
         find_update(lists.masters, lists.exp_avgs, i, [](auto t, auto s) { return adamw_run<decltype(t), decltype(s)>; })});
  }
  Runs(lists.masters).parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t) {
    tensors[i].run(tensors[i], options, step.factor, steps_taken(lists.steps, i) + 1, begin, end);
  });
  advance_steps(lists.steps);
  return true;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CPU, m) { m.impl("adamw_", TORCH_BOX(&mpk::adamw_)); }
