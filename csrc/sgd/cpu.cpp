// SPDX-License-Identifier: Apache-2.0
// sgd_ on the CPU: one parallel region over all tensors, every byte read and written once.

#include <torch/csrc/stable/library.h>

#include "../common/clones.h"
#include "../common/fetch.h"
#include "../common/runs.h"
#include "../common/update.h"
#include "lists.h"
#include "update.h"

namespace mpk {
namespace {

template <class T, class S, bool kMomentum>
MPK_CLONES void sgd_block(const SgdScalars<T>& scalars, const T* __restrict__ grad, T* __restrict__ w, S* __restrict__ buffer,
                          int64_t n) {
  const SgdScalars<T> s = scalars;
  for (int64_t i = 0; i < n; ++i) sgd_element<T, S, kMomentum>(s, grad[i], w[i], kMomentum ? buffer + i : nullptr);
}

struct SgdTensor {
  GradAndCopy io;
  char *master, *momentum_buffer;
  void (*run)(const SgdTensor&, const SgdOptions&, double factor, float steps_taken, int64_t begin, int64_t end);
};

template <class T, class S>
void sgd_run(const SgdTensor& tensor, const SgdOptions& options, double factor, float steps_taken, int64_t begin, int64_t end) {
  const SgdScalars<T> scalars(options, factor, steps_taken);
  T* w = reinterpret_cast<T*>(tensor.master);
  S* buffer = reinterpret_cast<S*>(tensor.momentum_buffer);
  update_run<T>(tensor.io, w, begin, end, [&](const T* grad, int64_t i, int64_t n) {
    if (buffer != nullptr) {
      if (kFetchesAhead) fetch_ahead<1024>(buffer + i, n);
      sgd_block<T, S, true>(scalars, grad, w + i, buffer + i, n);
    } else {
      sgd_block<T, S, false>(scalars, grad, w + i, nullptr, n);
    }
  });
}

// Whether the step was taken.
bool sgd_(Tensor masters_, Tensor grads_, Tensor momentum_buffers_, Tensor copies_, Tensor steps_, Tensor /*on*/, Tensor lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
          std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> grad_norm,
          std::optional<double> max_norm) {
  const SgdLists lists(masters_, grads_, momentum_buffers_, copies_, steps_);
  const Step step = read_step(grad_scale, found_inf, grad_norm, max_norm, maximize);
  if (!step.taken) return false;

  const SgdOptions options{real_value(lr), momentum, dampening, weight_decay, nesterov};
  std::vector<SgdTensor> tensors;
  tensors.reserve(lists.masters.size());
  for (int64_t i = 0; i < lists.masters.size(); ++i) {
    tensors.push_back({GradAndCopy(lists.masters, lists.grads, lists.copies, i), lists.masters.data(i),
                       lists.momentum_buffers.empty() ? nullptr : lists.momentum_buffers.data(i),
                       find_update(lists.masters, lists.momentum_buffers, i,
                                   [](auto t, auto s) { return sgd_run<decltype(t), decltype(s)>; })});
  }
  Runs(lists.masters).parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t) {
    tensors[i].run(tensors[i], options, step.factor, steps_taken(lists.steps, i), begin, end);
  });
  advance_steps(lists.steps);
  return true;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CPU, m) { m.impl("sgd_", TORCH_BOX(&mpk::sgd_)); }
