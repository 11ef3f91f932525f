// SPDX-License-Identifier: Apache-2.0
// The update of every rule on the CPU: one parallel region over all tensors, every byte read and written once.

#include <algorithm>
#include <variant>

#include "../common/cast.h"
#include "../common/chunk_partition.h"
#include "../common/clones.h"
#include "../common/prefetch.h"
#include "rules.h"

namespace mpk {
namespace {

// How many steps tensor i has taken: the optimizer's own count, fp32, which stays at 2^24 as torch's does.
float& steps_taken(const TensorList& steps, int64_t i) { return *reinterpret_cast<float*>(steps.data(i)); }

// ----- a segment of a tensor -----

// One tensor's gradient and copy, and their casts to and from the master's dtype.
struct GradAndCopy {
  const char* grad;
  char* copy;  // null where none is wanted
  int64_t grad_itemsize, copy_itemsize;
  Cast from_grad;  // null where the gradient has the master's dtype
  Cast to_copy, to_copy_non_temporal;

  GradAndCopy(const TensorList& masters, const TensorList& grads, const TensorList& copies, int64_t i)
      : grad(grads.data(i)),
        copy(copies.numel(i) ? copies.data(i) : nullptr),
        grad_itemsize(size_of(grads.dtype(i))),
        copy_itemsize(size_of(copies.dtype(i))),
        from_grad(grads.dtype(i) == masters.dtype(i) ? nullptr : find_cast(grads.dtype(i), masters.dtype(i))),
        to_copy(find_cast(masters.dtype(i), copies.dtype(i))),
        to_copy_non_temporal(find_cast_non_temporal(masters.dtype(i), copies.dtype(i))) {}
};

// update(grad, begin, n) on blocks of [begin, end) that stay in the first-level cache from the gradient to the copy. The copy
// is stored around the cache, except where the segment is so short that the fence takes longer than its update.
template <class T, class F>
void for_each_block(const GradAndCopy& io, const T* master, int64_t begin, int64_t end, const F& update) {
  constexpr int64_t kBlock = 128, kShort = 2048;
  const bool non_temporal = end - begin >= kShort;
  const Cast to_copy = non_temporal ? io.to_copy_non_temporal : io.to_copy;
  alignas(64) T wide[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const char* grad = io.grad + i * io.grad_itemsize;
    if (kPrefetches) {
      prefetch<1024>(grad, n * io.grad_itemsize);
      prefetch<1024>(master + i, n);
    }
    if (io.from_grad != nullptr) io.from_grad(grad, wide, n);
    update(io.from_grad == nullptr ? reinterpret_cast<const T*>(grad) : wide, i, n);
    if (io.copy != nullptr) to_copy(master + i, io.copy + i * io.copy_itemsize, n);
  }
  if (non_temporal) store_fence();
}

// n elements of a tensor, from element `first`.
template <class Variant, class Scalars, class T, class... S>
MPK_CLONES void update_block(const Scalars& scalars, int64_t first, int64_t n, const T* __restrict__ grad, T* __restrict__ w,
                             S* __restrict__... states) {
  const Scalars s = scalars;
  for (int64_t i = 0; i < n; ++i) Variant::element(s, first + i, grad[i], w[i], states[i]...);
}

template <class Rule>
struct TensorUpdate {
  template <class T>
  using Scalars = typename Rule::template Scalars<T>;
  using Run = void (*)(const TensorUpdate&, int64_t begin, int64_t end);

  GradAndCopy io;
  char* master;
  std::array<char*, kStateLists<Rule>> states;
  std::variant<Scalars<float>, Scalars<double>> scalars;
  Run run;
};

template <class Variant, class T, class S, class Rule, size_t... k>
void update_segment(const TensorUpdate<Rule>& tensor, int64_t begin, int64_t end, std::index_sequence<k...>) {
  const auto& scalars = std::get<typename Rule::template Scalars<T>>(tensor.scalars);
  T* w = reinterpret_cast<T*>(tensor.master);
  for_each_block<T>(tensor.io, w, begin, end, [&](const T* grad, int64_t i, int64_t n) {
    if (kPrefetches) (prefetch<1024>(reinterpret_cast<S*>(tensor.states[k]) + i, n), ...);
    update_block<Variant>(scalars, i, n, grad, w + i, (reinterpret_cast<S*>(tensor.states[k]) + i)...);
  });
}

// ----- a call -----

// f(T{}, S{}) for the dtype T of master i and S of its states.
template <class F>
auto with_dtypes(const UpdateLists& lists, int64_t i, const F& f) {
  const bool narrow = !lists.states.empty() && lists.states[0].dtype(i) == ScalarType::BFloat16;
  if (lists.masters.dtype(i) == ScalarType::Double) return narrow ? f(double{}, BFloat16{}) : f(double{}, double{});
  return narrow ? f(float{}, BFloat16{}) : f(float{}, float{});
}

template <class Rule>
typename TensorUpdate<Rule>::Run find_run(const UpdateCall<Rule>& call, int64_t i) {
  return Rule::with_variant(call.options, call.lists.states.size(), [&](auto variant) {
    return with_dtypes(call.lists, i, [](auto t, auto s) -> typename TensorUpdate<Rule>::Run {
      using Variant = decltype(variant);
      using S = std::conditional_t<Variant::kStates == 0, decltype(t), decltype(s)>;
      return [](const TensorUpdate<Rule>& tensor, int64_t begin, int64_t end) {
        update_segment<Variant, decltype(t), S>(tensor, begin, end, std::make_index_sequence<Variant::kStates>());
      };
    });
  });
}

// Scalars of the tensor before are taken where they are the same: powers cost more than the update of a short tensor.
template <class Rule>
std::vector<TensorUpdate<Rule>> make_tensors(const UpdateCall<Rule>& call, const StepInputs& step) {
  const UpdateLists& lists = call.lists;
  typename Rule::Options options = call.options;
  options.lr = step.lr();
  const double factor = step.factor();
  std::vector<TensorUpdate<Rule>> tensors;
  tensors.reserve(lists.masters.size());
  for (int64_t i = 0; i < lists.masters.size(); ++i) {
    TensorUpdate<Rule> tensor{
        GradAndCopy(lists.masters, lists.grads, lists.copies, i), lists.masters.data(i), {}, {}, find_run(call, i)};
    for (size_t k = 0; k < lists.states.size(); ++k) tensor.states[k] = lists.states[k].data(i);
    const float t = steps_taken(lists.steps, i);
    if (i > 0 && t == steps_taken(lists.steps, i - 1) && lists.masters.dtype(i) == lists.masters.dtype(i - 1)) {
      tensor.scalars = tensors.back().scalars;
    } else if (lists.masters.dtype(i) == ScalarType::Double) {
      tensor.scalars = typename Rule::template Scalars<double>(options, factor, t);
    } else {
      tensor.scalars = typename Rule::template Scalars<float>(options, factor, t);
    }
    tensors.push_back(tensor);
  }
  return tensors;
}

template <class Rule>
struct CpuUpdate {
  static bool update(const UpdateCall<Rule>& call) {
    const StepInputs step = step_inputs(call);
    if (!step.taken()) return false;
    const std::vector<TensorUpdate<Rule>> tensors = make_tensors(call, step);
    ChunkPartition(call.lists.masters).parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t) {
      tensors[i].run(tensors[i], begin, end);
    });
    for (int64_t i = 0; i < call.lists.steps.size(); ++i) steps_taken(call.lists.steps, i) += 1;
    return true;
  }
};

const bool are_registered = register_rules<CpuUpdate>(Device::kCpu);  // while the library is loaded

}  // namespace
}  // namespace mpk
