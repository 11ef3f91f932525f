// SPDX-License-Identifier: Apache-2.0
// adamw_ of ONE element, and the scalars that a tensor's elements share.

#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace mpk {

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // weight decay as in AdamW; else as in Adam

  MPK_HOST_DEVICE bool adds_decay() const { return !decoupled && weight_decay != 0; }
};

template <class T>
struct AdamwScalars {
  T factor, decay, weight_decay, keep1, beta2, keep2, step_size, eps;

  AdamwScalars() = default;

  // w - lr / (1 - beta1^t) * m / (sqrt(v) / root + eps), root = sqrt(1 - beta2^t), with root multiplied out in fp64: one
  // division an element instead of two.
  MPK_HOST_DEVICE AdamwScalars(const AdamwOptions& o, double factor, int64_t t) {
    const double root = std::sqrt(1 - std::pow(o.beta2, static_cast<double>(t)));
    this->factor = static_cast<T>(factor);
    decay = static_cast<T>(o.decoupled ? 1 - o.lr * o.weight_decay : 1);
    weight_decay = static_cast<T>(o.weight_decay);
    keep1 = static_cast<T>(1 - o.beta1);
    beta2 = static_cast<T>(o.beta2);
    keep2 = static_cast<T>(1 - o.beta2);
    step_size = static_cast<T>(o.lr / (1 - std::pow(o.beta1, static_cast<double>(t))) * root);
    eps = static_cast<T>(o.eps * root);
  }
};

// kMax: vmax is the running maximum of v (amsgrad). kAddsDecay: weight decay goes into the gradient (Adam).
template <class T, bool kMax, bool kAddsDecay>
MPK_HOST_DEVICE inline void adamw_element(const AdamwScalars<T>& s, T grad, T& w, T& m, T& v, T* vmax) {
  T g = grad * s.factor;
  if constexpr (kAddsDecay) g = g + s.weight_decay * w;
  m = m + s.keep1 * (g - m);
  v = s.beta2 * v + s.keep2 * g * g;
  T used = v;
  if constexpr (kMax) {
    used = *vmax >= v || *vmax != *vmax ? *vmax : v;  // NaN stays, as in torch.maximum
    *vmax = used;
  }
  w = w * s.decay - s.step_size * (m / (std::sqrt(used) + s.eps));
}

}  // namespace mpk
