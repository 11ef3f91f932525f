// SPDX-License-Identifier: Apache-2.0
// Products of bf16 operands on CPUs whose instructions multiply pairs of them, that follow each other along the depth, and add
// both products to an fp32 sum: AVX-512 BF16 and AMX.
//
// A pair is carried in the 32 bits of an fp32, which it is not. These instructions take everything below 2^-126 for 0,
// operands, products and sums. Hence a block is multiplied by them only where its least operands say that no product of them is
// below 2^-100. Products of bf16, of 8 bits each, are then multiples of 2^-114, and so are all sums: nothing is taken for 0.
//
// Included by cpu.cpp, which has the headers of the intrinsics and defines MPK_PAIRS where the compiler knows them.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "../common/clones.h"
#include "../common/dtype.h"

namespace mpk {
namespace {

struct Pairs {
  int64_t rows;  // of a tile
  // acc (rows, 32) = [acc +] a (rows, 2 pairs) @ panel (2 pairs, 32). Rows of a end in zeros up to a multiple of kPairsAtOnce,
  // as the panel does.
  void (*tile)(const float* a, int64_t a_pitch, const float* panel, int64_t pairs, int64_t rows, float* acc, int64_t acc_pitch,
               bool add);
  void (*begin)();  // before and after the tiles of a thread
  void (*end)();
};

constexpr int64_t kPairColumns = 32, kPairsAtOnce = 16;

constexpr int64_t whole_pairs(int64_t pairs) { return (pairs + kPairsAtOnce - 1) / kPairsAtOnce * kPairsAtOnce; }

// ----- operands -----

// The least magnitude of some bf16 that are not 0, less one, so that 0 is the largest of all.
constexpr uint16_t kNone = 0xffff;  // of nothing but zeros

MPK_CLONES uint16_t least_of(const float* pairs, int64_t n) {
  using Halves = const uint16_t __attribute__((may_alias));
  Halves* bits = reinterpret_cast<Halves*>(pairs);
  uint16_t found = kNone;
  for (int64_t i = 0; i < 2 * n; ++i) found = std::min(found, static_cast<uint16_t>((bits[i] & 0x7fff) - 1));
  return found;
}

// A bf16 in fp32 in the upper half of its bits, where a NaN may have nothing to show for itself.
inline uint32_t upper(float x) { return x == x ? c10::bit_cast<uint32_t>(x) : 0x7fc00000; }

// The first of a pair lies in the lower half.
inline float pair(float first, float second) { return c10::bit_cast<float>(upper(first) >> 16 | (upper(second) & 0xffff0000)); }

// to[i] = the pair of first[i] and second[i], bf16.
MPK_CLONES void pair_up(const void* first_bytes, const void* second_bytes, int64_t n, float* to) {
  const auto* first = static_cast<const BFloat16*>(first_bytes);
  const auto* second = static_cast<const BFloat16*>(second_bytes);
  for (int64_t i = 0; i < n; ++i) {
    to[i] = c10::bit_cast<float>(first[i].x | static_cast<uint32_t>(second[i].x) << 16);
  }
}

// The same of bf16 in fp32: to[i * to_pitch + j] = the pair j of row i.
MPK_CLONES void pair_rows(const float* from, int64_t pitch, int64_t rows, int64_t depth, float* to, int64_t to_pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = from + i * pitch;
    for (int64_t j = 0; j < depth / 2; ++j) to[i * to_pitch + j] = pair(row[2 * j], row[2 * j + 1]);
    if (depth % 2 != 0) to[i * to_pitch + depth / 2] = pair(row[depth - 1], 0);
  }
}

// to[j * kPairColumns + i] = the pair j of column i.
MPK_CLONES void pair_panel(const float* from, int64_t columns, int64_t depth, float* to) {
  for (int64_t j = 0; j < (depth + 1) / 2; ++j) {
    const float* row = from + 2 * j * kPairColumns;
    const bool whole = 2 * j + 1 < depth;
    for (int64_t i = 0; i < columns; ++i) to[j * kPairColumns + i] = pair(row[i], whole ? row[kPairColumns + i] : 0);
  }
}

// Whether no product of two that are not 0 is below 2^-100, where these are the least of them.
inline bool are_large(uint16_t least_a, uint16_t least_b) {
  if (least_a == kNone || least_b == kNone) return true;
  const int a = (least_a + 1) >> 7, b = (least_b + 1) >> 7;  // exponents, biased by 127; of subnormals 0
  return a != 0 && b != 0 && a + b >= 2 * 127 - 100;
}

// ----- any CPU, for the tests of what is around the instructions, and what they do to small numbers -----

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0 : x; }

inline void tile_by_numbers(const float* a, int64_t a_pitch, const float* panel, int64_t pairs, int64_t rows, float* acc,
                            int64_t acc_pitch, bool add) {
  const auto number = [](float pair, int i) {
    const uint32_t bits = c10::bit_cast<uint32_t>(pair);
    return flushed(c10::bit_cast<float>(i == 0 ? bits << 16 : bits & 0xffff0000));
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kPairColumns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < whole_pairs(pairs); ++k) {
        for (int i = 0; i < 2; ++i) {
          const float product = number(a[r * a_pitch + k], i) * number(panel[k * kPairColumns + j], i);
          sum = flushed(sum + flushed(product));
        }
      }
      float& to = acc[r * acc_pitch + j];
      to = add ? to + sum : sum;
    }
  }
}

inline void nothing() {}

constexpr Pairs kPairsByNumbers = {32, tile_by_numbers, nothing, nothing};

// ----- AVX-512 BF16 and AMX -----

#ifdef MPK_PAIRS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
template <int R>
void pairs_tile(const float* a, int64_t a_pitch, const float* panel, int64_t pairs, float* acc, int64_t acc_pitch, bool add) {
  __m512 sum[R][2] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_ps(panel + k * kPairColumns));
    const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_ps(panel + k * kPairColumns + 16));
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

constexpr int kPairRows = 14;  // 28 sums, 2 vectors of the panel and x in 32 registers

template <size_t... R>
constexpr std::array<decltype(&pairs_tile<1>), sizeof...(R)> pairs_tiles(std::index_sequence<R...>) {
  return {pairs_tile<R + 1>...};
}

inline void tile_by_vectors(const float* a, int64_t a_pitch, const float* panel, int64_t pairs, int64_t rows, float* acc,
                            int64_t acc_pitch, bool add) {
  static constexpr auto kTiles = pairs_tiles(std::make_index_sequence<kPairRows>());
  kTiles[rows - 1](a, a_pitch, panel, pairs, acc, acc_pitch, add);
}

constexpr Pairs kPairsByVectors = {kPairRows, tile_by_vectors, nothing, nothing};
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")
constexpr int kAmxRows = 32;  // two registers of 16 rows, times two of 16 columns: four of sums

inline void configure_amx() {
  // NOTE: static, because the compiler is told of no more than the first bytes that the instruction reads.
  static constexpr struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } registers;
  _tile_loadconfig(&registers);
}

inline void release_amx() { _tile_release(); }

// Multiplies all 32 rows, whatever lies in those beyond `rows`. The sums are added by AVX-512, which keeps subnormal ones.
inline void tile_by_amx(const float* a, int64_t a_pitch, const float* panel, int64_t pairs, int64_t rows, float* acc,
                        int64_t acc_pitch, bool add) {
  const int64_t a_bytes = a_pitch * sizeof(float), panel_bytes = kPairColumns * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < pairs; k += kPairsAtOnce) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + 16 * a_pitch + k, a_bytes);
    _tile_loadd(6, panel + k * kPairColumns, panel_bytes);
    _tile_loadd(7, panel + k * kPairColumns + 16, panel_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[kAmxRows * kPairColumns];
  const int64_t sums_bytes = kPairColumns * sizeof(float);
  _tile_stored(0, sums, sums_bytes);
  _tile_stored(1, sums + 16, sums_bytes);
  _tile_stored(2, sums + 16 * kPairColumns, sums_bytes);
  _tile_stored(3, sums + 16 * kPairColumns + 16, sums_bytes);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kPairColumns; j += 16) {
      float* to = acc + r * acc_pitch + j;
      const __m512 sum = _mm512_load_ps(sums + r * kPairColumns + j);
      _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + sum : sum);
    }
  }
}

constexpr Pairs kPairsByAmx = {kAmxRows, tile_by_amx, configure_amx, release_amx};
#pragma GCC pop_options

inline bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// Linux hands out the registers of AMX, 8 KB a thread, to processes that ask for them.
inline bool has_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

}  // namespace
}  // namespace mpk
