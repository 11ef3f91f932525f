// SPDX-License-Identifier: Apache-2.0
// adamw_ on the GPU: one launch over many tensors, every byte read and written once.

#include <torch/csrc/stable/library.h>

#include "../common/step.cuh"
#include "lists.h"
#include "update.h"

namespace mpk {
namespace {

enum AdamwState { kExpAvg = kFirstState, kExpAvgSq, kMaxExpAvgSq };

template <bool kMax>
struct AdamwArguments {
  StepInputs step;
  AdamwOptions options;  // lr is read on the device
  TensorTable<kMax ? 7 : 6, sizeof(StepInputs) + sizeof(AdamwOptions) + 32> tensors;
};
static_assert(sizeof(AdamwArguments<false>) <= kArgumentBytes && sizeof(AdamwArguments<true>) <= kArgumentBytes);

template <class T, class S, bool kMax, bool kAddsDecay>
struct AdamwUpdate {
  const char* grad;
  ScalarType grad_dtype, copy_dtype;
  char* copy;  // null where none is wanted
  T* master;
  S *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  AdamwScalars<T> scalars;

  template <int N>
  struct Values {
    RawGrad<T, N> grad;
    Elements<T, N> w;
    Elements<S, N> m, v, vmax;
  };

  template <int N>
  __device__ bool aligned(int64_t i) const {
    return is_vector<N>(grad, grad_dtype, i) && (copy == nullptr || is_vector<N>(copy, copy_dtype, i)) &&
           is_aligned(master + i, kWidest) && is_vector<N>(exp_avg + i) && is_vector<N>(exp_avg_sq + i) &&
           (!kMax || is_vector<N>(max_exp_avg_sq + i));
  }

  template <int N>
  __device__ void load(int64_t i, Values<N>& x) const {
    x.grad.load(grad, grad_dtype, i);
    mpk::load<PassCache>(master + i, x.w);
    mpk::load<PassCache>(exp_avg + i, x.m);
    mpk::load<PassCache>(exp_avg_sq + i, x.v);
    if constexpr (kMax) mpk::load<PassCache>(max_exp_avg_sq + i, x.vmax);
  }

  template <int N>
  __device__ void step_and_store(int64_t i, Values<N>& x) const {
    const Elements<T, N> g = x.grad.get(grad_dtype);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      adamw_element<T, S, kMax, kAddsDecay>(scalars, i + k, g.at[k], x.w.at[k], x.m.at[k], x.v.at[k], &x.vmax.at[k]);
    }
    store(master + i, x.w);
    store(exp_avg + i, x.m);
    store(exp_avg_sq + i, x.v);
    if constexpr (kMax) store(max_exp_avg_sq + i, x.vmax);
    if (copy != nullptr) store_copy(copy, copy_dtype, i, x.w);
  }
};

template <class T, class S, bool kMax, bool kAddsDecay>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) adamw_kernel(MPK_GRID_CONSTANT(AdamwArguments<kMax>) a) {
  // skip before any other load
  if (!a.step.taken()) return;

  // map block to chunk
  const auto& tensors = a.tensors;
  const TensorChunk chunk = tensors.find(blockIdx.x);
  const int i = chunk.tensor;

  // scalars, once a block: fp64 is slow
  __shared__ AdamwScalars<T> scalars;
  if (threadIdx.x == 0) {
    AdamwOptions options = a.options;
    options.lr = a.step.lr();
    scalars = AdamwScalars<T>(options, a.step.factor(), steps_taken(tensors, i) + 1);
  }
  __syncthreads();

  // load / update / store
  AdamwUpdate<T, S, kMax, kAddsDecay> update;
  update.grad = tensors.data[kGrad][i];
  update.grad_dtype = tensors.grad_dtype[i];
  update.copy_dtype = tensors.copy_dtype[i];
  update.copy = tensors.data[kCopy][i];
  update.master = reinterpret_cast<T*>(tensors.data[kMaster][i]);
  update.exp_avg = reinterpret_cast<S*>(tensors.data[kExpAvg][i]);
  update.exp_avg_sq = reinterpret_cast<S*>(tensors.data[kExpAvgSq][i]);
  if constexpr (kMax) update.max_exp_avg_sq = reinterpret_cast<S*>(tensors.data[kMaxExpAvgSq][i]);
  update.scalars = scalars;
  update_chunk<T>(update, chunk);
}

template <bool kMax, bool kAddsDecay>
void launch_adamw(const UpdateLists& lists, const std::vector<const TensorList*>& states, const StepInputs& step,
                  const AdamwOptions& options, cudaStream_t stream) {
  AdamwArguments<kMax> a;
  a.step = step;
  a.options = options;
  for_each_dtypes(lists.masters, *states[0], [&](auto t, auto s, const std::vector<int64_t>& rows) {
    const auto kernel = adamw_kernel<decltype(t), decltype(s), kMax, kAddsDecay>;
    for_each_table(a.tensors, rows, lists, states, [&] { launch(kernel, a.tensors.chunks, kThreads, 0, stream, a); });
  });
}

auto find_launch(bool has_max, bool adds_decay) {
  if (has_max) return adds_decay ? launch_adamw<true, true> : launch_adamw<true, false>;
  return adds_decay ? launch_adamw<false, true> : launch_adamw<false, false>;
}

// Always true: whether the step is taken is known on the device, and a skipped one has changed nothing.
bool adamw_(Tensor masters_, Tensor grads_, Tensor exp_avgs_, Tensor exp_avg_sqs_, Tensor max_exp_avg_sqs_, Tensor copies_,
            Tensor steps_, Tensor on, Tensor lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
            bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> grad_norm,
            std::optional<double> max_norm) {
  const AdamwLists lists(masters_, grads_, exp_avgs_, exp_avg_sqs_, max_exp_avg_sqs_, copies_, steps_);
  const OnDevice device(on);
  const StepInputs step = step_inputs("adamw_", device.stream(), lr, maximize, grad_scale, found_inf, grad_norm, max_norm);
  const AdamwOptions options{/*lr=*/0, beta1, beta2, eps, weight_decay, decoupled};
  std::vector<const TensorList*> states{&lists.exp_avgs, &lists.exp_avg_sqs};
  if (!lists.max_exp_avg_sqs.empty()) states.push_back(&lists.max_exp_avg_sqs);
  const auto launch_all = find_launch(!lists.max_exp_avg_sqs.empty(), options.adds_decay());
  launch_all({lists.masters, lists.grads, lists.copies, lists.steps}, states, step, options, device.stream());
  advance_steps(lists.steps, step, device.stream());
  return true;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CUDA, m) { m.impl("adamw_", TORCH_BOX(&mpk::adamw_)); }
