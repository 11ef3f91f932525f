// SPDX-License-Identifier: Apache-2.0
// The rule of lion_.

#pragma once

#include "call.h"
#include "round.h"

namespace mpk {

struct Lion {
  static constexpr const char* kName = "lion_";
  static constexpr const char* kStateNames[] = {"exp_avgs"};
  static constexpr int kRequiredStates = 1;

  struct Options {
    double lr, beta1, beta2, weight_decay;
  };
  using Parameters = ParameterTypes<double, double, double>;

  template <class T>
  struct Scalars {
    T factor, lr, decay, beta1, keep1, beta2, keep2;
    uint32_t seed;  // of this step's roundings of exp_avg

    Scalars() = default;

    MPK_HOST_DEVICE Scalars(const Options& o, double factor, float steps_taken)
        : factor(static_cast<T>(factor)),
          lr(static_cast<T>(o.lr)),
          decay(static_cast<T>(1 - o.lr * o.weight_decay)),
          beta1(static_cast<T>(o.beta1)),
          keep1(static_cast<T>(1 - o.beta1)),
          beta2(static_cast<T>(o.beta2)),
          keep2(static_cast<T>(1 - o.beta2)),
          seed(hash32(c10::bit_cast<uint32_t>(steps_taken + 1))) {}
  };

  struct Variant {
    static constexpr int kStates = 1;

    template <class T, class S>
    MPK_HOST_DEVICE static void element(const Scalars<T>& s, int64_t i, T grad, T& w, S& exp_avg) {
      const T g = grad * s.factor, m = convert<T>(exp_avg);
      const T direction = s.beta1 * m + s.keep1 * g;
      const T sign = direction != direction ? direction : T(direction > 0) - T(direction < 0);  // NaN reaches the weight
      w = w * s.decay - s.lr * sign;
      exp_avg = stochastic_round<S>(s.beta2 * m + s.keep2 * g, s.seed, i);
    }
  };

  template <class F>
  static auto with_variant(const Options&, int, const F& f) {
    return f(Variant{});
  }
};

}  // namespace mpk
