// SPDX-License-Identifier: Apache-2.0
// The bf16 dot-product instructions, VDPBF16PS (AVX-512 BF16) and TDPBF16PS (AMX), and the VNNI layout of their operands: two
// bf16 that are neighbors along K share one 32-bit word; both products are added to an fp32 accumulator.
//
// A word is carried in a float, whose value has no meaning. The instructions flush operands, products and sums below 2^-126 to
// 0. Hence a k-block is multiplied by them only if the smallest nonzero magnitudes of its operands show that no product is
// below 2^-100. As bf16 has 8 significant bits, products and sums are then multiples of 2^-114, and nothing is flushed.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "../../common/clones.h"
#include "../../common/dtype.h"
#include "isa.h"

namespace mpk {
namespace {

struct Bf16DotKernel {
  int64_t mr;  // rows of a register tile
  // acc (rows, 32) = [acc +] a (rows, words) @ panel (words, 32), of VNNI words. Rows of a and the panel are zero-padded to a
  // multiple of kVnniStep words.
  void (*tile)(const float* a, int64_t a_pitch, const float* panel, int64_t words, int64_t rows, float* acc, int64_t acc_pitch,
               bool add);
  void (*begin)();  // before and after the tiles of a thread
  void (*end)();
};

constexpr int64_t kVnniNR = 32, kVnniStep = 16;  // columns of a panel; words along K of one TDPBF16PS

constexpr int64_t padded_words(int64_t words) { return (words + kVnniStep - 1) / kVnniStep * kVnniStep; }

// ----- the guard against flushed products -----

// A magnitude is the bits of a bf16 without the sign, less one: 0 wraps around to the largest, whose exponent is 512.
constexpr uint16_t kAllZero = 0xffff;

MPK_CLONES uint16_t min_nonzero_magnitude(const void* elements, int64_t n) {
  using Bits = const uint16_t __attribute__((may_alias));
  Bits* bits = static_cast<Bits*>(elements);
  uint16_t found = kAllZero;
  for (int64_t i = 0; i < n; ++i) found = std::min(found, static_cast<uint16_t>((bits[i] & 0x7fff) - 1));
  return found;
}

// Whether no product of nonzero elements with these minima is below 2^-100.
inline bool products_stay_normal(uint16_t min_a, uint16_t min_b) {
  const int a = (min_a + 1) >> 7, b = (min_b + 1) >> 7;  // biased exponents; 0 of subnormals
  return a != 0 && b != 0 && a + b >= 2 * 127 - 100;
}

// ----- packing -----

// The bits of a bf16 that is held in fp32: its upper half. A NaN is made quiet, as its payload may lie in the lower half alone.
inline uint32_t upper(float x) { return x == x ? c10::bit_cast<uint32_t>(x) : 0x7fc00000; }

// The first lies in the lower half.
inline float vnni_word(float first, float second) {
  return c10::bit_cast<float>(upper(first) >> 16 | (upper(second) & 0xffff0000));
}

// to[j * to_pitch + i] = the word of elements i of rows 2j and 2j + 1 of `from`, bf16, for i < n.
MPK_CLONES void interleave_rows(const void* from_bytes, int64_t pitch, int64_t words, int64_t n, float* to, int64_t to_pitch) {
  const auto* from = static_cast<const BFloat16*>(from_bytes);
  for (int64_t j = 0; j < words; ++j) {
    const BFloat16 *first = from + 2 * j * pitch, *second = first + pitch;
    for (int64_t i = 0; i < n; ++i) {
      to[j * to_pitch + i] = c10::bit_cast<float>(first[i].x | static_cast<uint32_t>(second[i].x) << 16);
    }
  }
}

// From bf16 in fp32: to[i * to_pitch + j] = word j of row i.
MPK_CLONES void vnni_rows(const float* from, int64_t pitch, int64_t rows, int64_t K, float* to, int64_t to_pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = from + i * pitch;
    for (int64_t j = 0; j < K / 2; ++j) to[i * to_pitch + j] = vnni_word(row[2 * j], row[2 * j + 1]);
    if (K % 2 != 0) to[i * to_pitch + K / 2] = vnni_word(row[K - 1], 0);
  }
}

// From bf16 in fp32: to[j * kVnniNR + i] = word j of column i.
MPK_CLONES void vnni_panel(const float* from, int64_t columns, int64_t K, float* to) {
  for (int64_t j = 0; j < (K + 1) / 2; ++j) {
    const float* row = from + 2 * j * kVnniNR;
    const bool has_second = 2 * j + 1 < K;
    for (int64_t i = 0; i < columns; ++i) to[j * kVnniNR + i] = vnni_word(row[i], has_second ? row[kVnniNR + i] : 0);
  }
}

// ----- portable: emulates the instructions with their flushing, for tests of the code around them -----

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0 : x; }

inline void tile_portable(const float* a, int64_t a_pitch, const float* panel, int64_t words, int64_t rows, float* acc,
                          int64_t acc_pitch, bool add) {
  const auto element = [](float word, int i) {
    const uint32_t bits = c10::bit_cast<uint32_t>(word);
    return flushed(c10::bit_cast<float>(i == 0 ? bits << 16 : bits & 0xffff0000));
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kVnniNR; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < padded_words(words); ++k) {
        for (int i = 0; i < 2; ++i) {
          const float product = element(a[r * a_pitch + k], i) * element(panel[k * kVnniNR + j], i);
          sum = flushed(sum + flushed(product));
        }
      }
      float& to = acc[r * acc_pitch + j];
      to = add ? to + sum : sum;
    }
  }
}

inline void no_setup() {}

constexpr Bf16DotKernel kBf16DotPortable = {32, tile_portable, no_setup, no_setup};

// ----- AVX-512 BF16 and AMX -----

#ifdef MPK_BF16_DOT_KERNELS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
template <int R>
void avx512_bf16_tile(const float* a, int64_t a_pitch, const float* panel, int64_t words, float* acc, int64_t acc_pitch,
                      bool add) {
  __m512 sum[R][2] = {};
  for (int64_t k = 0; k < words; ++k) {
    const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_ps(panel + k * kVnniNR));
    const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_ps(panel + k * kVnniNR + 16));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_ps(a[r * a_pitch + k]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, left);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* to = acc + r * acc_pitch;
    _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + sum[r][0] : sum[r][0]);
    _mm512_storeu_ps(to + 16, add ? _mm512_loadu_ps(to + 16) + sum[r][1] : sum[r][1]);
  }
}

constexpr int kAvx512Bf16MR = 14;  // 32 registers: 28 accumulators, 2 vectors of the panel and x

template <size_t... R>
constexpr std::array<decltype(&avx512_bf16_tile<1>), sizeof...(R)> avx512_bf16_tiles(std::index_sequence<R...>) {
  return {avx512_bf16_tile<R + 1>...};
}

inline void tile_avx512_bf16(const float* a, int64_t a_pitch, const float* panel, int64_t words, int64_t rows, float* acc,
                             int64_t acc_pitch, bool add) {
  static constexpr auto kTiles = avx512_bf16_tiles(std::make_index_sequence<kAvx512Bf16MR>());
  kTiles[rows - 1](a, a_pitch, panel, words, acc, acc_pitch, add);
}

constexpr Bf16DotKernel kBf16DotAvx512 = {kAvx512Bf16MR, tile_avx512_bf16, no_setup, no_setup};
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")
constexpr int kAmxMR = 32;  // two tile registers of 16 rows times two of 16 columns: four accumulators

inline void configure_amx() {
  // NOTE: static, because the intrinsic tells the compiler only of the first bytes that the instruction reads.
  static constexpr struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } registers;
  _tile_loadconfig(&registers);
}

inline void release_amx() { _tile_release(); }

// Multiplies all 32 rows; results beyond `rows` are dropped. AVX-512 adds to acc, as it keeps subnormal sums.
inline void tile_amx(const float* a, int64_t a_pitch, const float* panel, int64_t words, int64_t rows, float* acc,
                     int64_t acc_pitch, bool add) {
  const int64_t a_bytes = a_pitch * sizeof(float), panel_bytes = kVnniNR * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < words; k += kVnniStep) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + 16 * a_pitch + k, a_bytes);
    _tile_loadd(6, panel + k * kVnniNR, panel_bytes);
    _tile_loadd(7, panel + k * kVnniNR + 16, panel_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[kAmxMR * kVnniNR];
  const int64_t sums_bytes = kVnniNR * sizeof(float);
  _tile_stored(0, sums, sums_bytes);
  _tile_stored(1, sums + 16, sums_bytes);
  _tile_stored(2, sums + 16 * kVnniNR, sums_bytes);
  _tile_stored(3, sums + 16 * kVnniNR + 16, sums_bytes);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kVnniNR; j += 16) {
      float* to = acc + r * acc_pitch + j;
      const __m512 sum = _mm512_load_ps(sums + r * kVnniNR + j);
      _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + sum : sum);
    }
  }
}

constexpr Bf16DotKernel kBf16DotAmx = {kAmxMR, tile_amx, configure_amx, release_amx};
#pragma GCC pop_options
#endif

}  // namespace
}  // namespace mpk
