// SPDX-License-Identifier: Apache-2.0
// The activations of linear_act on the CPU, for ONE element, and their loops. Of +, *, / and bits alone, and nothing is
// contracted: an element has the same bits in a vector and in what is left over, so wherever it stands in a tensor.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <iterator>

#include "../common/clones.h"
#include "../common/dtype.h"

namespace mpk {
namespace {

// Numbered as the schema carries them.
enum class Activation : int64_t { kNone, kRelu, kRelu2, kGelu, kGeluTanh, kSilu };

// exp(x) within 2 roundings: 2**n * exp(r), |r| <= ln(2) / 2, by its series, whose ninth term is below a rounding.
inline float exponential(float x) {
  x = x < -104 ? -104 : x;  // exp is 0 below and inf above; NaN stays
  x = x > 89 ? 89 : x;
  constexpr float kRound = 0x1.8p23f;  // whose last bit is worth 1
  const float shifted = x * 0x1.715476p0f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts, the first product exact
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1;
  sum = sum * r + 1;
  // In two factors, as 2**n may be beyond the format where the product is not.
  const int32_t exponent = c10::bit_cast<int32_t>(shifted) - c10::bit_cast<int32_t>(kRound), half = exponent >> 1;
  const auto power = [](int32_t e) { return c10::bit_cast<float>((e + 127) << 23); };
  return sum * power(half) * power(exponent - half);
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// The normal distribution up to x; bell: exp(-x * x / 2). Above |x| lies t q(t) bell, t = 1 / (1 + 0.3 |x|); q is a
// least-squares fit with a relative error below 3e-8.
inline float normal_cdf(float x, float bell) {
  const float t = 1 / (1 + 0.3f * std::fabs(x));
  float q = -0.02061293f;
  q = q * t + 0.112376325f;
  q = q * t + -0.22806881f;
  q = q * t + 0.19158342f;
  q = q * t + -0.07924877f;
  q = q * t + 0.09605859f;
  q = q * t + 0.07842532f;
  q = q * t + 0.110227376f;
  q = q * t + 0.11957283f;
  q = q * t + 0.11968663f;
  const float tail = t * q * bell;
  return x < 0 ? tail : 1 - tail;
}

inline float bell(float x) { return exponential(-0.5f * x * x); }

// GELU's tanh form is x * sigmoid of this: (1 + tanh(a / 2)) / 2 is sigmoid(a).
constexpr float kTanh = 1.5957691216f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
inline float tanh_argument(float x) { return kTanh * x * (1 + kCube * x * x); }

template <Activation kind>
inline float activated(float z) {
  const float positive = z <= 0 ? 0 : z;  // NaN stays
  if constexpr (kind == Activation::kRelu) return positive;
  if constexpr (kind == Activation::kRelu2) return positive * positive;
  if constexpr (kind == Activation::kGelu) return z * normal_cdf(z, bell(z));
  if constexpr (kind == Activation::kGeluTanh) return z * sigmoid(tanh_argument(z));
  if constexpr (kind == Activation::kSilu) return z / (1 + exponential(-z));
  return z;
}

// What `grad` becomes before the activation, at z: what is saved, of a ReLU the output, which selects.
template <Activation kind>
inline float activation_gradient(float grad, float z) {
  if constexpr (kind == Activation::kRelu) return z <= 0 ? 0 : grad;  // and where it is NaN
  if constexpr (kind == Activation::kRelu2) return z <= 0 ? 0 : 2 * z * grad;
  constexpr float kSteep = 1000;  // from here on slopes are 0 or 1, and at infinity their formulas are NaN
  z = z < -kSteep ? -kSteep : z;
  z = z > kSteep ? kSteep : z;
  if constexpr (kind == Activation::kGelu) {
    const float b = bell(z);
    return grad * (normal_cdf(z, b) + z * b * 0.3989422804f);  // 1 / sqrt(2 pi)
  }
  constexpr bool kIsSilu = kind == Activation::kSilu;
  const float inner = kIsSilu ? 1 : kTanh * (1 + 3 * kCube * z * z);
  const float e = exponential(-(kIsSilu ? z : tanh_argument(z)));
  const float s = 1 / (1 + e), rest = s == 0 ? 1 : e * s;  // 1 - s, in which nothing cancels
  return grad * (s * (1 + z * rest * inner));
}

template <Activation kind>
MPK_CLONES void activate_run(float* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = activated<kind>(z[i]);
}

template <Activation kind>
MPK_CLONES void activation_gradient_run(float* grad, const float* saved, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] = activation_gradient<kind>(grad[i], saved[i]);
}

struct ActivationLoops {
  void (*activate)(float* z, int64_t n);
  void (*gradient)(float* grad, const float* saved, int64_t n);
};

template <Activation kind>
constexpr ActivationLoops kLoopsOf = {activate_run<kind>, activation_gradient_run<kind>};

// In the order of the enumerators; both null for none.
constexpr ActivationLoops kActivationLoops[] = {
    {},
    kLoopsOf<Activation::kRelu>,
    kLoopsOf<Activation::kRelu2>,
    kLoopsOf<Activation::kGelu>,
    kLoopsOf<Activation::kGeluTanh>,
    kLoopsOf<Activation::kSilu>,
};

inline ActivationLoops activation_loops(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < static_cast<int64_t>(std::size(kActivationLoops)), "no activation ",
                  activation);
  return kActivationLoops[activation];
}

}  // namespace
}  // namespace mpk
