// SPDX-License-Identifier: Apache-2.0
// Casts of a run of elements: loops that the compiler vectorizes, and F16C where it cannot.

#include "cast.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "clones.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace mpk {
namespace {

template <class From, class To>
MPK_CLONES void cast_run(const void* from_bytes, void* to_bytes, int64_t n) {
  const From* __restrict__ from = static_cast<const From*>(from_bytes);
  To* __restrict__ to = static_cast<To*>(to_bytes);
  for (int64_t i = 0; i < n; ++i) to[i] = convert<To>(from[i]);
}

#ifdef __x86_64__
// gcc 12 does not vectorize the conversions of fp16, so they are written out.
__attribute__((target("avx,f16c"))) void half_to_float(const void* from_bytes, void* to_bytes, int64_t n) {
  const Half* from = static_cast<const Half*>(from_bytes);
  float* to = static_cast<float*>(to_bytes);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].x);
}

__attribute__((target("avx,f16c"))) void float_to_half(const void* from_bytes, void* to_bytes, int64_t n) {
  const float* from = static_cast<const float*>(from_bytes);
  Half* to = static_cast<Half*>(to_bytes);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);  // round: fp32 -> fp16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), rounded);
  }
  for (; i < n; ++i) to[i].x = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);  // round: fp32 -> fp16
}

const bool has_f16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
#endif

template <class From, class To>
Cast cast_between() {
#ifdef __x86_64__
  if constexpr (std::is_same_v<From, Half> && std::is_same_v<To, float>) {
    if (has_f16c) return half_to_float;
  }
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Half>) {
    if (has_f16c) return float_to_half;
  }
#endif
  return cast_run<From, To>;
}

template <class From>
Cast cast_from(ScalarType to) {
  if (to == ScalarType::Half) return cast_between<From, Half>();
  if (to == ScalarType::BFloat16) return cast_between<From, BFloat16>();
  if (to == ScalarType::Float) return cast_between<From, float>();
  STD_TORCH_CHECK(to == ScalarType::Double, "cannot cast to this dtype");
  return cast_between<From, double>();
}

}  // namespace

Cast find_cast(ScalarType from, ScalarType to) {
  if (from == ScalarType::Half) return cast_from<Half>(to);
  if (from == ScalarType::BFloat16) return cast_from<BFloat16>(to);
  if (from == ScalarType::Float) return cast_from<float>(to);
  STD_TORCH_CHECK(from == ScalarType::Double, "cannot cast from this dtype");
  return cast_from<double>(to);
}

#ifdef __x86_64__
void store_past_cache(void* to_bytes, const void* from_bytes, int64_t bytes) {
  char* to = static_cast<char*>(to_bytes);
  const char* from = static_cast<const char*>(from_bytes);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 15);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  std::memcpy(to + i, from + i, bytes - i);
}

void fence_stores() { _mm_sfence(); }
#else
void store_past_cache(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }

void fence_stores() {}
#endif

}  // namespace mpk
