// SPDX-License-Identifier: Apache-2.0
// sgd_ on the CPU: one parallel region over all tensors, every byte read and written once.

#include <torch/csrc/stable/library.h>

#include "../common/clones.h"
#include "../common/runs.h"
#include "../common/update.h"
#include "update.h"

namespace mpk {
namespace {

struct SgdTensor {
  GradAndCopy io;
  bool is_double;
  void *master, *momentum_buffer;
};

template <class T, bool kMomentum>
MPK_CLONES void sgd_block(const SgdScalars<T>& scalars, const T* __restrict__ grad, T* __restrict__ w, T* __restrict__ buffer,
                          int64_t n) {
  const SgdScalars<T> s = scalars;
  for (int64_t i = 0; i < n; ++i) sgd_element<T, kMomentum>(s, grad[i], w[i], kMomentum ? buffer + i : nullptr);
}

template <class T>
void sgd_run(const SgdTensor& tensor, const SgdOptions& options, double factor, int64_t steps_taken, int64_t begin,
             int64_t end) {
  const SgdScalars<T> scalars(options, factor, steps_taken);
  T *w = static_cast<T*>(tensor.master), *buffer = static_cast<T*>(tensor.momentum_buffer);
  update_run<T>(tensor.io, w, begin, end, [&](const T* grad, int64_t i, int64_t n) {
    if (buffer != nullptr) {
      sgd_block<T, true>(scalars, grad, w + i, buffer + i, n);
    } else {
      sgd_block<T, false>(scalars, grad, w + i, nullptr, n);
    }
  });
}

// Whether the step was taken.
bool sgd_(Tensors masters, Tensors grads, Tensors momentum_buffers, Tensors copies, Tensor steps, Tensor lr, double momentum,
          double dampening, double weight_decay, bool nesterov, bool maximize, std::optional<Tensor> grad_scale,
          std::optional<Tensor> found_inf, std::optional<Tensor> grad_norm, std::optional<double> max_norm) {
  check_list("grads", grads, masters);
  check_list("copies", copies, masters, /*may_be_empty=*/true);
  check_state("momentum_buffers", momentum_buffers, masters);
  const Step step = read_step(grad_scale, found_inf, grad_norm, max_norm, maximize);
  if (!step.taken) return false;

  const SgdOptions options{real_value(lr), momentum, dampening, weight_decay, nesterov};
  std::vector<SgdTensor> tensors;
  tensors.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i) {
    tensors.push_back({GradAndCopy(masters[i], grads[i], copies[i]), masters[i].scalar_type() == ScalarType::Double,
                       masters[i].mutable_data_ptr(),
                       momentum_buffers.empty() ? nullptr : momentum_buffers[i].mutable_data_ptr()});
  }
  StepCounts counts(steps);
  Runs(masters).parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const auto run = tensors[i].is_double ? sgd_run<double> : sgd_run<float>;
    run(tensors[i], options, step.factor, counts[i], begin, end);
  });
  counts.advance();
  return true;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CPU, m) { m.impl("sgd_", TORCH_BOX(&mpk::sgd_)); }
