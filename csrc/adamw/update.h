// SPDX-License-Identifier: Apache-2.0
// adamw_ of ONE element, and the scalars that a tensor's elements share.

#pragma once

#include <cmath>
#include <cstdint>

#include "../common/moment.h"

namespace mpk {

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // weight decay as in AdamW; else as in Adam

  bool operator==(const AdamwOptions& o) const {
    return lr == o.lr && beta1 == o.beta1 && beta2 == o.beta2 && eps == o.eps && weight_decay == o.weight_decay &&
           decoupled == o.decoupled;
  }

  MPK_HOST_DEVICE bool adds_decay() const { return !decoupled && weight_decay != 0; }
};

template <class T>
struct AdamwScalars {
  T factor, decay, weight_decay, keep1, beta2, keep2, step_size, eps;
  uint32_t seed;  // of this step's roundings of exp_avg_sq

  AdamwScalars() = default;

  // w - lr / (1 - beta1^t) * m / (sqrt(v) / root + eps), root = sqrt(1 - beta2^t), with root multiplied out in fp64: one
  // division an element instead of two.
  MPK_HOST_DEVICE AdamwScalars(const AdamwOptions& o, double factor, float t) {
    const double root = std::sqrt(1 - std::pow(o.beta2, double{t}));
    this->factor = static_cast<T>(factor);
    decay = static_cast<T>(o.decoupled ? 1 - o.lr * o.weight_decay : 1);
    weight_decay = static_cast<T>(o.weight_decay);
    keep1 = static_cast<T>(1 - o.beta1);
    beta2 = static_cast<T>(o.beta2);
    keep2 = static_cast<T>(1 - o.beta2);
    step_size = static_cast<T>(o.lr / (1 - std::pow(o.beta1, double{t})) * root);
    eps = static_cast<T>(o.eps * root);
    seed = scrambled(c10::bit_cast<uint32_t>(t));
  }
};

// Element i of its tensor. kMax: vmax is the running maximum of v (amsgrad). kAddsDecay: weight decay goes into the gradient
// (Adam).
template <class T, class S, bool kMax, bool kAddsDecay>
MPK_HOST_DEVICE inline void adamw_element(const AdamwScalars<T>& s, int64_t i, T grad, T& w, S& exp_avg, S& exp_avg_sq,
                                          S* max_exp_avg_sq) {
  T g = grad * s.factor;
  if constexpr (kAddsDecay) g = g + s.weight_decay * w;
  T m = convert<T>(exp_avg), v = convert<T>(exp_avg_sq);
  m = m + s.keep1 * (g - m);
  v = s.beta2 * v + s.keep2 * g * g;
  exp_avg = to_nearest<S>(m);
  exp_avg_sq = to_either_side<S>(v, s.seed, i);
  T used = v;
  if constexpr (kMax) {
    const T vmax = convert<T>(*max_exp_avg_sq);
    used = vmax >= v || vmax != vmax ? vmax : v;  // NaN stays, as in torch.maximum
    *max_exp_avg_sq = to_nearest<S>(used);
  }
  w = w * s.decay - s.step_size * (m / (std::sqrt(used) + s.eps));
}

}  // namespace mpk
