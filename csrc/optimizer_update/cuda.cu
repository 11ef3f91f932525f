// SPDX-License-Identifier: Apache-2.0
// The update of every rule on the GPU: one launch over many tensors, every byte read and written once, behind a small one for
// what the elements of each tensor share.

#include "../common/launch.h"
#include "../common/stream.h"
#include "cuda.cuh"
#include "rules.h"

namespace mpk {
namespace {

constexpr int kBlocksPerSm = 2;  // at least; asked for more, the compiler spills

// ----- scalars -----

template <class Rule, class T>
struct ScalarsArguments {
  static constexpr size_t kOtherBytes = sizeof(StepInputs) + sizeof(typename Rule::Options) + 2 * sizeof(void*);
  static constexpr int kCapacity = (kArgumentBytes - kOtherBytes) / sizeof(float*);

  StepInputs step;
  typename Rule::Options options;  // lr is read on the device
  typename Rule::template Scalars<T>* scalars;
  int64_t count;
  float* steps[kCapacity];
};

// A thread for each tensor: its scalars, in fp64, which is slow, and its step taken. The updates are launched after it.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads) scalars_kernel(MPK_GRID_CONSTANT(ScalarsArguments<Rule, T>) a) {
  if (!a.step.taken()) return;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.count) return;
  typename Rule::Options options = a.options;
  options.lr = a.step.lr();
  const float steps_taken = *a.steps[i];  // the optimizer's own count, fp32, which stays at 2^24 as torch's does
  a.scalars[i] = typename Rule::template Scalars<T>(options, a.step.factor(), steps_taken);
  *a.steps[i] = steps_taken + 1;
}

// ----- the update -----

template <class Scalars, int kStates>
struct UpdateArguments {
  StepInputs step;
  const Scalars* scalars;  // by the row of a tensor
  TensorTable<kFirstState + kStates, sizeof(StepInputs) + 64> tensors;
};

template <class Rule, class Variant, class T>
using ArgumentsOf = UpdateArguments<typename Rule::template Scalars<T>, Variant::kStates>;

template <class Rule, class Variant, class T, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) update_kernel(MPK_GRID_CONSTANT(ArgumentsOf<Rule, Variant, T>) a) {
  // skip before any other load
  if (!a.step.taken()) return;

  // map block to chunk
  const auto& tensors = a.tensors;
  const TensorChunk chunk = tensors.find(blockIdx.x);
  const int i = chunk.tensor;

  // load / update / store
  using Scalars = typename Rule::template Scalars<T>;
  update_chunk<T>(TensorUpdate<Variant, Scalars, T, S>(tensors, i, a.scalars[tensors.row[i]]), chunk);
}

// ----- on the host -----

// An lr on the CPU is read now.
template <class Rule>
StepInputs device_step_inputs(const UpdateCall<Rule>& call, cudaStream_t stream) {
  StepInputs in = step_inputs(call);
  if (is_on_device(call.lr)) return in;
  STD_TORCH_CHECK(!is_capturing(stream), Rule::kName,
                  ": lr is on the CPU and would be frozen in the CUDA graph; pass it as a tensor on the device");
  in.lr_value = in.lr();
  in.lr_float = nullptr;
  in.lr_double = nullptr;
  return in;
}

// scalars[j] of the tensor rows[j].
template <class Rule, class T>
void launch_scalars(const UpdateCall<Rule>& call, const StepInputs& step, const std::vector<int64_t>& rows,
                    typename Rule::template Scalars<T>* scalars, cudaStream_t stream) {
  ScalarsArguments<Rule, T> a;
  static_assert(sizeof(a) <= kArgumentBytes);
  a.step = step;
  a.options = call.options;
  for (size_t begin = 0; begin < rows.size(); begin += a.count) {
    a.scalars = scalars + begin;
    a.count = std::min<int64_t>(rows.size() - begin, a.kCapacity);
    for (int64_t j = 0; j < a.count; ++j) a.steps[j] = reinterpret_cast<float*>(call.lists.steps.data(rows[begin + j]));
    launch<scalars_kernel<Rule, T>>(static_cast<unsigned>((a.count + kThreads - 1) / kThreads), kThreads, 0, stream, a);
  }
}

// launch_as(T{}, S{}, rows) for each dtype T of a master and S of its states that occur together.
template <class F>
void for_each_dtypes(const UpdateLists& lists, const F& launch_as) {
  std::vector<int64_t> rows[4];
  for (int64_t i = 0; i < lists.masters.size(); ++i) {
    const bool is_double = lists.masters.dtype(i) == ScalarType::Double;
    const bool is_narrow = !lists.states.empty() && lists.states[0].dtype(i) == ScalarType::BFloat16;
    rows[2 * is_narrow + is_double].push_back(i);
  }
  if (!rows[0].empty()) launch_as(float{}, float{}, rows[0]);
  if (!rows[1].empty()) launch_as(double{}, double{}, rows[1]);
  if (!rows[2].empty()) launch_as(float{}, BFloat16{}, rows[2]);
  if (!rows[3].empty()) launch_as(double{}, BFloat16{}, rows[3]);
}

// Fills the table with the tensors of `rows`, whose row in it is their place there, and calls go() whenever it is full and at
// the end.
template <class Table, class Go>
void for_each_table(Table& table, const std::vector<int64_t>& rows, const UpdateLists& lists, const Go& go) {
  const auto flush = [&] {
    if (table.count > 0) go();
    table.clear(kChunkUnit);
  };
  table.clear(kChunkUnit);
  for (size_t j = 0; j < rows.size(); ++j) {
    const int64_t row = rows[j];
    const int i = table.add(j, lists.masters.numel(row));
    table.grad_dtype[i] = lists.grads.dtype(row);
    table.copy_dtype[i] = lists.copies.dtype(row);
    table.data[kMaster][i] = lists.masters.data(row);
    table.data[kGrad][i] = lists.grads.data(row);  // never written
    table.data[kCopy][i] = lists.copies.numel(row) ? lists.copies.data(row) : nullptr;
    for (size_t k = 0; k < lists.states.size(); ++k) table.data[kFirstState + k][i] = lists.states[k].data(row);
    if (table.is_full()) flush();
  }
  flush();
}

template <class Rule>
struct CudaUpdate {
  // Always true: whether the step is taken is known on the device, and a skipped one has changed nothing.
  static bool update(const UpdateCall<Rule>& call) {
    const OnDevice device(call.on);
    const StepInputs step = device_step_inputs(call, device.stream());
    Rule::with_variant(call.options, call.lists.states.size(),
                       [&](auto variant) { launch_variant<decltype(variant)>(call, step, device.stream()); });
    return true;
  }

 private:
  template <class Variant>
  static void launch_variant(const UpdateCall<Rule>& call, const StepInputs& step, cudaStream_t stream) {
    for_each_dtypes(call.lists, [&](auto t, auto s, const std::vector<int64_t>& rows) {
      using T = decltype(t);
      using S = std::conditional_t<Variant::kStates == 0, T, decltype(s)>;
      using Scalars = typename Rule::template Scalars<T>;
      const Scratch<Scalars> scalars(call.on, rows.size());
      launch_scalars<Rule, T>(call, step, rows, scalars.data(), stream);
      ArgumentsOf<Rule, Variant, T> a;
      static_assert(sizeof(a) <= kArgumentBytes);
      a.step = step;
      a.scalars = scalars.data();
      constexpr auto kKernel = update_kernel<Rule, Variant, T, S>;
      for_each_table(a.tensors, rows, call.lists, [&] { launch<kKernel>(a.tensors.chunks, kThreads, 0, stream, a); });
    });
  }
};

const bool are_registered = register_rules<CudaUpdate>(Device::kCuda);  // while the library is loaded

}  // namespace
}  // namespace mpk
