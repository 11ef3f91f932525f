// SPDX-License-Identifier: Apache-2.0
// The rule of adamw_: AdamW and Adam.

#pragma once

#include <cmath>
#include <cstdint>

#include "call.h"
#include "round.h"

namespace mpk {

struct Adamw {
  static constexpr const char* kName = "adamw_";
  static constexpr const char* kStateNames[] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};  // the last with amsgrad
  static constexpr int kRequiredStates = 2;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay;
    bool decoupled;  // weight decay as in AdamW; else as in Adam
  };
  using Parameters = ParameterTypes<double, double, double, double, bool>;

  template <class T>
  struct Scalars {
    T factor, decay, weight_decay, keep1, beta2, keep2, step_size, eps;
    uint32_t seed;  // of this step's roundings of exp_avg_sq

    Scalars() = default;

    // w - lr / (1 - beta1^t) * m / (sqrt(v) / root + eps), root = sqrt(1 - beta2^t), with root multiplied out in fp64: one
    // division an element instead of two.
    MPK_HOST_DEVICE Scalars(const Options& o, double factor, float steps_taken) {
      const float t = steps_taken + 1;
      const double root = std::sqrt(1 - std::pow(o.beta2, double{t}));
      this->factor = static_cast<T>(factor);
      decay = static_cast<T>(o.decoupled ? 1 - o.lr * o.weight_decay : 1);
      weight_decay = static_cast<T>(o.weight_decay);
      keep1 = static_cast<T>(1 - o.beta1);
      beta2 = static_cast<T>(o.beta2);
      keep2 = static_cast<T>(1 - o.beta2);
      step_size = static_cast<T>(o.lr / (1 - std::pow(o.beta1, double{t})) * root);
      eps = static_cast<T>(o.eps * root);
      seed = hash32(c10::bit_cast<uint32_t>(t));
    }
  };

  // kAddsDecay: weight decay goes into the gradient (Adam).
  template <int kStates_, bool kAddsDecay>
  struct Variant {
    static constexpr int kStates = kStates_;

    // max_exp_avg_sq: the running maximum of exp_avg_sq (amsgrad), or none.
    template <class T, class S, class... Max>
    MPK_HOST_DEVICE static void element(const Scalars<T>& s, int64_t i, T grad, T& w, S& exp_avg, S& exp_avg_sq,
                                        Max&... max_exp_avg_sq) {
      T g = grad * s.factor;
      if constexpr (kAddsDecay) g = g + s.weight_decay * w;
      T m = convert<T>(exp_avg), v = convert<T>(exp_avg_sq);
      m = m + s.keep1 * (g - m);
      v = s.beta2 * v + s.keep2 * g * g;
      exp_avg = round_nearest<S>(m);
      exp_avg_sq = stochastic_round<S>(v, s.seed, i);
      T used = v;
      ((used = maximum(max_exp_avg_sq, v)), ...);
      w = w * s.decay - s.step_size * (m / (std::sqrt(used) + s.eps));
    }
  };

  template <class F>
  static auto with_variant(const Options& o, int states, const F& f) {
    const bool adds_decay = !o.decoupled && o.weight_decay != 0;
    if (states == 2) return adds_decay ? f(Variant<2, true>{}) : f(Variant<2, false>{});
    return adds_decay ? f(Variant<3, true>{}) : f(Variant<3, false>{});
  }

 private:
  template <class T, class S>
  MPK_HOST_DEVICE static T maximum(S& max_exp_avg_sq, T v) {
    const T vmax = convert<T>(max_exp_avg_sq);
    const T used = vmax >= v || vmax != vmax ? vmax : v;  // NaN stays, as in torch.maximum
    max_exp_avg_sq = round_nearest<S>(used);
    return used;
  }
};

}  // namespace mpk
