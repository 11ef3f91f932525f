// SPDX-License-Identifier: Apache-2.0
// scale = the least 2^k with amax / 2^k <= the format's largest, q = round(x / scale): one number at a time.

#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace mpk {

// An 8-bit float: bits of the mantissa without the hidden one, bias of the exponent, exponent of the largest number, whose
// mantissa is 1.75 in both formats.
template <int kMantissa_, int kBias_, int kMaxExponent_>
struct Format {
  static constexpr int kMantissa = kMantissa_, kBias = kBias_, kMaxExponent = kMaxExponent_;
};
using E4M3 = Format<3, 7, 8>;
using E5M2 = Format<2, 15, 15>;

constexpr int32_t kInfBits = 0x7F800000, kMagnitudeBits = 0x7FFFFFFF;
constexpr uint8_t kNan8 = 0x7F;  // in both

// Of a largest magnitude, as the bits of an fp32: those of inf and above give NaN.
template <class F>
float scale_of(int32_t amax) {
  if (amax == 0) return 1;
  if (amax >= kInfBits) return c10::bit_cast<float>(int32_t{0x7FC00000});
  // The addend carries into the exponent from a mantissa of 0x600001 on, which is above 1.75.
  const int32_t exponent = ((amax + 0x1FFFFF) >> 23) - F::kMaxExponent;
  return c10::bit_cast<float>((exponent < 1 ? 1 : exponent) << 23);
}

// The bits of the nearest number of the format, of ties the even one; y is not beyond the largest.
template <class F>
inline uint8_t encode(float y) {
  constexpr int kCut = 23 - F::kMantissa;
  constexpr int32_t kUnit = 127 + 24 - F::kBias - F::kMantissa;  // exponent of what a sum with ends in the least subnormal
  constexpr int32_t kLeastNormal = (128 - F::kBias) << 23;
  const int32_t signed_bits = c10::bit_cast<int32_t>(y), bits = signed_bits & kMagnitudeBits;
  const int32_t to_even = ((bits >> kCut) & 1) + ((1 << (kCut - 1)) - 1);
  const int32_t normal = ((bits + to_even) >> kCut) - ((127 - F::kBias) << F::kMantissa);  // round: fp32 -> 8 bits
  const float sum = c10::bit_cast<float>(bits) + c10::bit_cast<float>(kUnit << 23);        // round: fp32 -> 8 bits
  const int32_t subnormal = c10::bit_cast<int32_t>(sum) - (kUnit << 23);
  return static_cast<uint8_t>((bits < kLeastNormal ? subnormal : normal) | ((signed_bits >> 24) & 0x80));
}

}  // namespace mpk
