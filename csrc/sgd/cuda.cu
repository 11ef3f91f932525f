// SPDX-License-Identifier: Apache-2.0
// sgd_ on the GPU: one launch over many tensors, every byte read and written once.

#include <torch/csrc/stable/library.h>

#include "../common/step.cuh"
#include "lists.h"
#include "update.h"

namespace mpk {
namespace {

constexpr int kMomentumBuffer = kFirstState;

template <bool kMomentum>
struct SgdArguments {
  StepInputs step;
  SgdOptions options;  // lr is read on the device
  TensorTable<kMomentum ? 5 : 4, sizeof(StepInputs) + sizeof(SgdOptions) + 32> tensors;
};
static_assert(sizeof(SgdArguments<false>) <= kArgumentBytes && sizeof(SgdArguments<true>) <= kArgumentBytes);

template <class T, class S, bool kMomentum>
struct SgdUpdate {
  const char* grad;
  ScalarType grad_dtype, copy_dtype;
  char* copy;  // null where none is wanted
  T* master;
  S* momentum_buffer;
  SgdScalars<T> scalars;

  template <int N>
  struct Values {
    RawGrad<T, N> grad;
    Elements<T, N> w;
    Elements<S, N> buffer;
  };

  template <int N>
  __device__ bool aligned(int64_t i) const {
    return is_vector<N>(grad, grad_dtype, i) && (copy == nullptr || is_vector<N>(copy, copy_dtype, i)) &&
           is_aligned(master + i, kWidest) && (!kMomentum || is_vector<N>(momentum_buffer + i));
  }

  template <int N>
  __device__ void load(int64_t i, Values<N>& x) const {
    x.grad.load(grad, grad_dtype, i);
    mpk::load<PassCache>(master + i, x.w);
    if constexpr (kMomentum) mpk::load<PassCache>(momentum_buffer + i, x.buffer);
  }

  template <int N>
  __device__ void step_and_store(int64_t i, Values<N>& x) const {
    const Elements<T, N> g = x.grad.get(grad_dtype);
#pragma unroll
    for (int k = 0; k < N; ++k) sgd_element<T, S, kMomentum>(scalars, g.at[k], x.w.at[k], &x.buffer.at[k]);
    store(master + i, x.w);
    if constexpr (kMomentum) store(momentum_buffer + i, x.buffer);
    if (copy != nullptr) store_copy(copy, copy_dtype, i, x.w);
  }
};

template <class T, class S, bool kMomentum>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) sgd_kernel(MPK_GRID_CONSTANT(SgdArguments<kMomentum>) a) {
  // skip before any other load
  if (!a.step.taken()) return;

  // map block to chunk
  const auto& tensors = a.tensors;
  const TensorChunk chunk = tensors.find(blockIdx.x);
  const int i = chunk.tensor;

  // scalars, once a block: fp64 is slow
  __shared__ SgdScalars<T> scalars;
  if (threadIdx.x == 0) {
    SgdOptions options = a.options;
    options.lr = a.step.lr();
    scalars = SgdScalars<T>(options, a.step.factor(), steps_taken(tensors, i));
  }
  __syncthreads();

  // load / update / store
  SgdUpdate<T, S, kMomentum> update;
  update.grad = tensors.data[kGrad][i];
  update.grad_dtype = tensors.grad_dtype[i];
  update.copy_dtype = tensors.copy_dtype[i];
  update.copy = tensors.data[kCopy][i];
  update.master = reinterpret_cast<T*>(tensors.data[kMaster][i]);
  if constexpr (kMomentum) update.momentum_buffer = reinterpret_cast<S*>(tensors.data[kMomentumBuffer][i]);
  update.scalars = scalars;
  update_chunk<T>(update, chunk);
}

template <bool kMomentum>
void launch_sgd(const SgdLists& lists, const StepInputs& step, const SgdOptions& options, cudaStream_t stream) {
  SgdArguments<kMomentum> a;
  a.step = step;
  a.options = options;
  const std::vector<const TensorList*> states(kMomentum, &lists.momentum_buffers);
  for_each_dtypes(lists.masters, lists.momentum_buffers, [&](auto t, auto s, const std::vector<int64_t>& rows) {
    using T = decltype(t);
    const auto kernel = sgd_kernel<T, std::conditional_t<kMomentum, decltype(s), T>, kMomentum>;
    for_each_table(a.tensors, rows, {lists.masters, lists.grads, lists.copies, lists.steps}, states,
                   [&] { launch(kernel, a.tensors.chunks, kThreads, 0, stream, a); });
  });
}

// Always true: whether the step is taken is known on the device, and a skipped one has changed nothing.
bool sgd_(Tensor masters_, Tensor grads_, Tensor momentum_buffers_, Tensor copies_, Tensor steps_, Tensor on, Tensor lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
          std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> grad_norm,
          std::optional<double> max_norm) {
  const SgdLists lists(masters_, grads_, momentum_buffers_, copies_, steps_);
  const OnDevice device(on);
  const StepInputs step = step_inputs("sgd_", device.stream(), lr, maximize, grad_scale, found_inf, grad_norm, max_norm);
  const SgdOptions options{/*lr=*/0, momentum, dampening, weight_decay, nesterov};
  (lists.momentum_buffers.empty() ? launch_sgd<false> : launch_sgd<true>)(lists, step, options, device.stream());
  advance_steps(lists.steps, step, device.stream());
  return true;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CUDA, m) { m.impl("sgd_", TORCH_BOX(&mpk::sgd_)); }
