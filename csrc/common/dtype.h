// SPDX-License-Identifier: Apache-2.0
// Conversions between fp16, bf16, fp32 and fp64 with ONE rounding, to nearest even.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/bit_cast.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace mpk {

using torch::headeronly::BFloat16;
using torch::headeronly::Float8_e4m3fn;
using torch::headeronly::Float8_e5m2;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// fp64 -> fp32 rounded to odd: the last bit records that something was cut, so that the rounding to 16 bits that follows is
// right. Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
MPK_HOST_DEVICE inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  uint32_t bits = c10::bit_cast<uint32_t>(nearest);
  bits -= std::fabs(back) > std::fabs(x) ? 1u : 0u;
  bits |= back != x && x == x ? 1u : 0u;
  return c10::bit_cast<float>(bits);
}

MPK_HOST_DEVICE inline bool is_float8(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2;
}

MPK_HOST_DEVICE inline int size_of(ScalarType dtype) {
  if (is_float8(dtype)) return 1;
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// f(T{}) for the type T of a dtype of those four, on the host.
template <class F>
auto with_float(const char* name, ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Half) return f(Half{});
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  if (dtype == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(dtype == ScalarType::Double, name, " must be float16, bfloat16, float32 or float64");
  return f(double{});
}

template <class To, class From>
MPK_HOST_DEVICE inline To convert(From x) {
  if constexpr (std::is_same_v<From, double> && sizeof(To) == 2) {
    return static_cast<To>(round_to_odd(x));  // round: fp64 -> 16 bits
  } else if constexpr (sizeof(From) == 2) {
    return static_cast<To>(static_cast<float>(x));
  } else {
    return static_cast<To>(x);  // round: wide -> To
  }
}

}  // namespace mpk
