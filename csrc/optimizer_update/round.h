// SPDX-License-Identifier: Apache-2.0
// Rounding a state to how it is stored: in the master's dtype T, or in bf16 with S = BFloat16; the arithmetic is T's.

#pragma once

#include "../common/dtype.h"

namespace mpk {

// A hash of 32 bits: "lowbias32" of Wellons' search for multipliers (hash-prospector).
MPK_HOST_DEVICE inline uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// To nearest even.
template <class S, class T>
MPK_HOST_DEVICE inline S round_nearest(T x) {
  return convert<S>(x);  // round: T -> S
}

// Up or down to a bf16, with the probability that makes x the mean: an average whose changes are below half a last place is
// followed, where rounding to nearest would hold it still. `seed` is the step's, `i` the element: the same bits every time.
template <class S, class T>
MPK_HOST_DEVICE inline S stochastic_round(T x, uint32_t seed, int64_t i) {
  if constexpr (std::is_same_v<S, T>) {
    return x;
  } else {
    float wide;
    if constexpr (std::is_same_v<T, double>) {
      wide = round_to_odd(x);
    } else {
      wide = x;
    }
    const uint32_t bits = c10::bit_cast<uint32_t>(wide) + (hash32(static_cast<uint32_t>(i) ^ seed) >> 16);
    const uint16_t kept = wide != wide ? uint16_t{0x7fc0} : static_cast<uint16_t>(bits >> 16);  // round: fp32 -> bf16
    return c10::bit_cast<S>(kept);
  }
}

}  // namespace mpk
