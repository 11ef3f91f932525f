// SPDX-License-Identifier: Apache-2.0
// grad_stats_ of ONE element: what it adds to its tensor's amax and count of non-finite, and what makes a tensor overflow.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/dtype.h"

namespace mpk {

// A magnitude compared as an integer orders like the number: inf is above every finite value, NaN above inf.
template <class I, I kInfBits>
struct BitsOf {
  using type = I;
  static constexpr I kInf = kInfBits, kMagnitude = std::numeric_limits<I>::max();  // all but the sign
};
template <class T>
struct Bits;
template <>
struct Bits<Half> : BitsOf<int16_t, 0x7c00> {};
template <>
struct Bits<BFloat16> : BitsOf<int16_t, 0x7f80> {};
template <>
struct Bits<float> : BitsOf<int32_t, 0x7f800000> {};
template <>
struct Bits<double> : BitsOf<int64_t, 0x7ff0000000000000> {};

// amax is the magnitude's bits, of what is finite. count is a lane's share and of the element's width: up to 2^15 - 1.
template <class T>
MPK_HOST_DEVICE inline void grad_stats_element(typename Bits<T>::type bits, typename Bits<T>::type& amax,
                                               typename Bits<T>::type& count) {
  using I = typename Bits<T>::type;
  const I size = bits & Bits<T>::kMagnitude;
  const bool nonfinite = size >= Bits<T>::kInf;
  count += nonfinite;
  const I finite = nonfinite ? I(0) : size;
  amax = finite > amax ? finite : amax;
}

// Whether the largest gradient of a tensor of dtype T is beyond T's arithmetic (fp32, fp64 for fp64) once unscaled.
template <class T>
MPK_HOST_DEVICE inline bool overflows(double amax, double inv_scale) {
  if constexpr (std::is_same_v<T, double>) return !std::isfinite(amax * inv_scale);
  return !std::isfinite(static_cast<float>(amax) * static_cast<float>(inv_scale));
}

// Squares of fp64 gradients can over- and underflow. A sum of squares is that of gradients times a power of 2, which depends on
// the largest of them: 1 for all that fp32 and 16 bits can say, or else one with which nothing is lost.
enum class Size { kTiny, kUsual, kHuge };

MPK_HOST_DEVICE inline Size size_class(double amax) {
  return amax >= 0x1p480 ? Size::kHuge : amax < 0x1p-480 ? Size::kTiny : Size::kUsual;
}

MPK_HOST_DEVICE inline double square_scale(Size size) {
  return size == Size::kHuge ? 0x1p-600 : size == Size::kTiny ? 0x1p600 : 1;
}

// What is known of some gradients; Stats{} of none.
struct Stats {
  double amax, squares;  // squares: of the gradients times square_scale(size_class(amax))
  int64_t nonfinite;

  MPK_HOST_DEVICE void merge(const Stats& other) {
    const double largest = other.amax > amax ? other.amax : amax;
    squares = squares_for(largest) + other.squares_for(largest);
    amax = largest;
    nonfinite += other.nonfinite;
  }

  // Their norm times `inv_scale`.
  MPK_HOST_DEVICE double norm(double inv_scale) const {
    const Size size = size_class(amax);
    const double unscale = size == Size::kHuge ? 0x1p600 : size == Size::kTiny ? 0x1p-600 : 1;
    return std::sqrt(squares) * inv_scale * unscale;
  }

  // The sum as it is where `largest` is the largest: beside a huge one, tiny ones are nothing.
  MPK_HOST_DEVICE double squares_for(double largest) const {
    const int up = static_cast<int>(size_class(largest)) - static_cast<int>(size_class(amax));
    const double scale = up == 0 ? 1 : up == 1 ? 0x1p-600 : 0;
    return squares * scale * scale;
  }
};

}  // namespace mpk
