// SPDX-License-Identifier: Apache-2.0
// Casts of arrays: loops that the compiler vectorizes, and AVX2's intrinsics where it cannot.

#include "cast.h"

#include <algorithm>
#include <cstring>

#include "clones.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace mpk {
namespace {

template <class From, class To>
MPK_CLONES void cast_loop(const void* from_bytes, void* to_bytes, int64_t n) {
  const From* __restrict__ from = static_cast<const From*>(from_bytes);
  To* __restrict__ to = static_cast<To*>(to_bytes);
  for (int64_t i = 0; i < n; ++i) to[i] = convert<To>(from[i]);
}

#ifdef __x86_64__
// gcc 12 does not vectorize the conversions of fp16, so they are written out.
MPK_AVX2 void half_to_float(const void* from_bytes, void* to_bytes, int64_t n) {
  const Half* from = static_cast<const Half*>(from_bytes);
  float* to = static_cast<float*>(to_bytes);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].x);
}

MPK_AVX2 void float_to_half(const void* from_bytes, void* to_bytes, int64_t n) {
  const float* from = static_cast<const float*>(from_bytes);
  Half* to = static_cast<Half*>(to_bytes);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);  // round: fp32 -> fp16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), rounded);
  }
  for (; i < n; ++i) to[i].x = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);  // round: fp32 -> fp16
}
#endif

template <class From, class To>
Cast cast_between() {
#ifdef __x86_64__
  if constexpr (std::is_same_v<From, Half> && std::is_same_v<To, float>) {
    if (has_avx2) return half_to_float;
  }
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Half>) {
    if (has_avx2) return float_to_half;
  }
#endif
  return cast_loop<From, To>;
}

#ifdef __x86_64__
void store_non_temporal(void* to_bytes, const void* from_bytes, int64_t bytes) {
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

template <class From, class To>
void cast_non_temporal(const void* from_bytes, void* to_bytes, int64_t n) {
  constexpr int64_t kBlock = 128;
  const From* from = static_cast<const From*>(from_bytes);
  To* to = static_cast<To*>(to_bytes);
  alignas(64) char block[kBlock * sizeof(To)];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t some = std::min(kBlock, n - i);
    cast_between<From, To>()(from + i, block, some);
    store_non_temporal(to + i, block, some * sizeof(To));
  }
}

MPK_AVX2 inline __m128i rounded_to(Half, __m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);  // round: fp32 -> fp16
}

// What torch's BFloat16 does, eight at a time.
MPK_AVX2 inline __m128i rounded_to(BFloat16, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF)));  // round: fp32 -> bf16
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC00000), is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}

// From registers to memory: through a buffer, the step took 10 % longer.
template <class To>
MPK_AVX2 void float_non_temporal(const void* from_bytes, void* to_bytes, int64_t n) {
  if (reinterpret_cast<uintptr_t>(to_bytes) % sizeof(__m256i) != 0)
    return cast_non_temporal<float, To>(from_bytes, to_bytes, n);
  const float* from = static_cast<const float*>(from_bytes);
  To* to = static_cast<To*>(to_bytes);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i low = rounded_to(To{}, _mm256_loadu_ps(from + i)), high = rounded_to(To{}, _mm256_loadu_ps(from + i + 8));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_set_m128i(high, low));
  }
  cast_between<float, To>()(from + i, to + i, n - i);
}
#endif

template <class From, class To>
Cast non_temporal_cast_between() {
#ifdef __x86_64__
  if constexpr (std::is_same_v<From, float> && sizeof(To) == 2) {
    if (has_avx2) return float_non_temporal<To>;
  }
  return cast_non_temporal<From, To>;
#else
  return cast_between<From, To>();
#endif
}

// f(From{}, To{})
template <class F>
Cast with_floats(ScalarType from, ScalarType to, const F& f) {
  return with_float("what is cast", from,
                    [&](auto x) { return with_float("a cast's result", to, [&](auto y) { return f(x, y); }); });
}

}  // namespace

Cast find_cast(ScalarType from, ScalarType to) {
  return with_floats(from, to, [](auto x, auto y) { return cast_between<decltype(x), decltype(y)>(); });
}

Cast find_cast_non_temporal(ScalarType from, ScalarType to) {
  return with_floats(from, to, [](auto x, auto y) { return non_temporal_cast_between<decltype(x), decltype(y)>(); });
}

#ifdef __x86_64__
void store_fence() { _mm_sfence(); }
#else
void store_fence() {}
#endif

}  // namespace mpk
