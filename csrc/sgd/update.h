// SPDX-License-Identifier: Apache-2.0
// sgd_ of ONE element, and the scalars that a tensor's elements share.

#pragma once

#include <cstdint>

#include "../common/moment.h"

namespace mpk {

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

template <class T>
struct SgdScalars {
  T factor, lr, momentum, keep, weight_decay;
  bool adds_decay, nesterov, first;  // first: this tensor's first step, whose buffer becomes the gradient

  SgdScalars() = default;

  MPK_HOST_DEVICE SgdScalars(const SgdOptions& o, double factor, float steps_taken)
      : factor(static_cast<T>(factor)),
        lr(static_cast<T>(o.lr)),
        momentum(static_cast<T>(o.momentum)),
        keep(static_cast<T>(1 - o.dampening)),
        weight_decay(static_cast<T>(o.weight_decay)),
        adds_decay(o.weight_decay != 0),
        nesterov(o.nesterov),
        first(steps_taken == 0) {}
};

template <class T, class S, bool kMomentum>
MPK_HOST_DEVICE inline void sgd_element(const SgdScalars<T>& s, T grad, T& w, S* buffer) {
  T g = grad * s.factor;
  if (s.adds_decay) g = g + s.weight_decay * w;
  if constexpr (kMomentum) {
    const T b = s.first ? g : s.momentum * convert<T>(*buffer) + s.keep * g;
    *buffer = to_nearest<S>(b);
    g = s.nesterov ? g + s.momentum * b : b;
  }
  w = w - s.lr * g;
}

}  // namespace mpk
