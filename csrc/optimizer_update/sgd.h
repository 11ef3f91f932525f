// SPDX-License-Identifier: Apache-2.0
// The rule of sgd_: SGD, with momentum and without.

#pragma once

#include <cstdint>

#include "call.h"
#include "round.h"

namespace mpk {

struct Sgd {
  static constexpr const char* kName = "sgd_";
  static constexpr const char* kStateNames[] = {"momentum_buffers"};
  static constexpr int kRequiredStates = 0;

  struct Options {
    double lr, momentum, dampening, weight_decay;
    bool nesterov;
  };
  using Parameters = ParameterTypes<double, double, double, bool>;

  template <class T>
  struct Scalars {
    T factor, lr, momentum, keep, weight_decay;
    bool adds_decay, nesterov, first;  // first: this tensor's first step, whose buffer becomes the gradient

    Scalars() = default;

    MPK_HOST_DEVICE Scalars(const Options& o, double factor, float steps_taken)
        : factor(static_cast<T>(factor)),
          lr(static_cast<T>(o.lr)),
          momentum(static_cast<T>(o.momentum)),
          keep(static_cast<T>(1 - o.dampening)),
          weight_decay(static_cast<T>(o.weight_decay)),
          adds_decay(o.weight_decay != 0),
          nesterov(o.nesterov),
          first(steps_taken == 0) {}
  };

  template <int kStates_>
  struct Variant {
    static constexpr int kStates = kStates_;

    // momentum_buffer: one, or none.
    template <class T, class... S>
    MPK_HOST_DEVICE static void element(const Scalars<T>& s, int64_t, T grad, T& w, S&... momentum_buffer) {
      T g = grad * s.factor;
      if (s.adds_decay) g = g + s.weight_decay * w;
      ((g = with_momentum(s, g, momentum_buffer)), ...);
      w = w - s.lr * g;
    }
  };

  template <class F>
  static auto with_variant(const Options&, int states, const F& f) {
    return states == 0 ? f(Variant<0>{}) : f(Variant<1>{});
  }

 private:
  template <class T, class S>
  MPK_HOST_DEVICE static T with_momentum(const Scalars<T>& s, T g, S& buffer) {
    const T b = s.first ? g : s.momentum * convert<T>(buffer) + s.keep * g;
    buffer = round_nearest<S>(b);
    return s.nesterov ? g + s.momentum * b : b;
  }
};

}  // namespace mpk
