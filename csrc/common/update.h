// SPDX-License-Identifier: Apache-2.0
// What the optimizer steps share on the CPU: the call's scalars, and the way of a run of elements through the cache.

#pragma once

#include <algorithm>

#include "cast.h"
#include "factor.h"
#include "fetch.h"
#include "tensor_list.h"

namespace mpk {

struct Step {
  bool taken;
  double factor;  // what a gradient is multiplied by: unscales, clips, and negates with maximize
};

inline Step read_step(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                      const std::optional<Tensor>& grad_norm, std::optional<double> max_norm, bool maximize) {
  const float scale = value_of<float>(grad_scale).value_or(1);
  if (!takes_step(value_of<float>(found_inf).value_or(0), scale)) return {false, 0};
  double factor = inv_scale(scale);
  if (max_norm) factor *= clip_factor(value_of<double>(grad_norm).value(), *max_norm);
  return {true, maximize ? -factor : factor};
}

// find(T{}, S{}) for the dtype T of master i and S of its moments.
template <class F>
auto find_update(const TensorList& masters, const TensorList& moments, int64_t i, const F& find) {
  const bool narrow = !moments.empty() && moments.dtype(i) == ScalarType::BFloat16;
  if (masters.dtype(i) == ScalarType::Double) return narrow ? find(double{}, BFloat16{}) : find(double{}, double{});
  return narrow ? find(float{}, BFloat16{}) : find(float{}, float{});
}

// How many steps tensor i has taken: the optimizer's own count, fp32, which stays at 2^24 as torch's does.
inline float& steps_taken(const TensorList& steps, int64_t i) { return *reinterpret_cast<float*>(steps.data(i)); }

inline void advance_steps(const TensorList& steps) {
  for (int64_t i = 0; i < steps.size(); ++i) steps_taken(steps, i) += 1;
}

// One tensor's gradient and copy, and how they become and come of the master's dtype.
struct GradAndCopy {
  const char* grad;
  char* copy;  // null where none is wanted
  int64_t grad_itemsize, copy_itemsize;
  Cast from_grad;  // null where the gradient has the master's dtype
  Cast to_copy, to_copy_past_cache;

  GradAndCopy(const TensorList& masters, const TensorList& grads, const TensorList& copies, int64_t i)
      : grad(grads.data(i)),
        copy(copies.numel(i) ? copies.data(i) : nullptr),
        grad_itemsize(size_of(grads.dtype(i))),
        copy_itemsize(size_of(copies.dtype(i))),
        from_grad(grads.dtype(i) == masters.dtype(i) ? nullptr : find_cast(grads.dtype(i), masters.dtype(i))),
        to_copy(find_cast(masters.dtype(i), copies.dtype(i))),
        to_copy_past_cache(find_cast_past_cache(masters.dtype(i), copies.dtype(i))) {}
};

// update(grad, begin, n) on blocks of [begin, end) that stay in the first-level cache from the gradient to the copy. The copy
// goes past the cache, except of a piece so short that the fence takes longer than its update.
template <class T, class F>
void update_run(const GradAndCopy& io, const T* master, int64_t begin, int64_t end, const F& update) {
  constexpr int64_t kBlock = 128, kShort = 2048;
  const bool past_cache = end - begin >= kShort;
  const Cast to_copy = past_cache ? io.to_copy_past_cache : io.to_copy;
  alignas(64) T wide[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const char* grad = io.grad + i * io.grad_itemsize;
    if (kFetchesAhead) {
      fetch_ahead<1024>(grad, n * io.grad_itemsize);
      fetch_ahead<1024>(master + i, n);
    }
    if (io.from_grad != nullptr) io.from_grad(grad, wide, n);
    update(io.from_grad == nullptr ? reinterpret_cast<const T*>(grad) : wide, i, n);
    if (io.copy != nullptr) to_copy(master + i, io.copy + i * io.copy_itemsize, n);
  }
  if (past_cache) fence_stores();
}

}  // namespace mpk
