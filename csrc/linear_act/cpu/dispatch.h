// SPDX-License-Identifier: Apache-2.0
// Dispatch by ISA: instantiates the micro-kernels once per instruction set and finds those of an Isa. The GEMM around them, in
// gemm.cpp, is the same code for all.
//
// microkernels.h is included once per namespace, under `#pragma GCC target`: a function's target is fixed where it is defined,
// so that one template cannot be instantiated for several ISAs; and target_clones compiles one source for each, whereas the
// vector width and the register tile differ here.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../common/dtype.h"
#include "isa.h"
#include "vnni.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // of passing vectors by value: no such function is called from another file

#if defined(__clang__) || __GNUC__ >= 12
#define MPK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MPK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I8{__VA_ARGS__})
#endif

namespace mpk {
namespace {

using V8 = float __attribute__((vector_size(32)));
using U8 = uint32_t __attribute__((vector_size(32)));
using I8 = int32_t __attribute__((vector_size(32)));

// Up to so many rows of a, reading b costs more than multiplying with it: b is then not packed, but read in place.
constexpr int64_t kFewRows = 4;
constexpr int64_t kDotPadding = 32;  // elements

using Widen = void (*)(const void* from, int64_t pitch, int64_t count, int64_t length, float* to, int64_t to_pitch);
using Dot = void (*)(const void* weight, const float* x, int64_t x_pitch, int64_t length, float* sums, int64_t sums_pitch);
using Tile = void (*)(const float* a, int64_t a_pitch, const float* panel, int64_t K, float* acc, int64_t acc_pitch, bool add);

// Those that read a matrix of one dtype, rounded to one compute dtype.
struct MicroKernels {
  Widen rows, transposed;
  Dot dot[kFewRows];  // of 1 row of x, of 2, ...
};

struct IsaKernels {
  int64_t mr, nr;     // rows and columns of a register tile
  const Tile* tiles;  // of 1 row, of 2, ..., of mr
  const MicroKernels& (*micro_kernels)(ScalarType compute, ScalarType from);
  const Bf16DotKernel* bf16_dot = nullptr;

  // Every 8-bit float is a bf16.
  const Bf16DotKernel* dot_kernel_for(ScalarType compute) const {
    return compute == ScalarType::BFloat16 || is_float8(compute) ? bf16_dot : nullptr;
  }
};

// ----- the micro-kernels of each ISA -----

namespace portable {
constexpr int kWidth = 4, kMR = 4;
template <class Vector>
inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
  return a * b + c;
}
inline V8 widen(const Half* from) {
  V8 v;
  for (int i = 0; i < 8; ++i) v[i] = convert<float>(from[i]);
  return v;
}
inline void narrow(const V8& v, Half* to) {
  for (int i = 0; i < 8; ++i) to[i] = convert<Half>(v[i]);  // round: fp32 -> fp16
}
#include "microkernels.h"
}  // namespace portable

namespace portable_vnni {
constexpr int kWidth = 16, kMR = 4;
using portable::fma, portable::narrow, portable::widen;
#include "microkernels.h"
}  // namespace portable_vnni

#ifdef MPK_X86_KERNELS
#define MPK_F16C                                                                                                               \
  inline V8 widen(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }       \
  inline void narrow(V8 v, Half* to) {                                                                                         \
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); /* round: fp32 -> fp16 */ \
  }

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr int kWidth = 8, kMR = 6;  // 16 registers: 12 accumulators, 2 vectors of the panel and x
inline V8 fma(V8 a, V8 b, V8 c) { return _mm256_fmadd_ps(a, b, c); }
MPK_F16C
#include "microkernels.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
constexpr int kWidth = 16, kMR = 14;  // 32 registers: 28 accumulators, 2 vectors of the panel and x
using V16 = float __attribute__((vector_size(64)));
inline V8 fma(V8 a, V8 b, V8 c) { return _mm256_fmadd_ps(a, b, c); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
MPK_F16C
#include "microkernels.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

// ----- the table -----

constexpr IsaKernels with_bf16_dot(IsaKernels kernels, const Bf16DotKernel* bf16_dot) {
  kernels.bf16_dot = bf16_dot;
  return kernels;
}

constexpr IsaKernels kPortableVnniKernels = with_bf16_dot(portable_vnni::kKernels, &kBf16DotPortable);
#ifdef MPK_BF16_DOT_KERNELS
constexpr IsaKernels kAvx512Bf16Kernels = with_bf16_dot(avx512::kKernels, &kBf16DotAvx512);
constexpr IsaKernels kAmxKernels = with_bf16_dot(avx512::kKernels, &kBf16DotAmx);
#endif

inline const IsaKernels& kernels_of(Isa isa) {
  switch (isa) {
#ifdef MPK_BF16_DOT_KERNELS
    case Isa::kAmx:
      return kAmxKernels;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
#endif
#ifdef MPK_X86_KERNELS
    case Isa::kAvx512:
      return avx512::kKernels;
    case Isa::kAvx2:
      return avx2::kKernels;
#endif
    case Isa::kPortableVnni:
      return kPortableVnniKernels;
    default:
      return portable::kKernels;
  }
}

// Refuses an ISA that this CPU does not have.
inline const IsaKernels& select_kernels(Isa isa) {
  static const std::vector<Isa> supported = supported_isas();
  static const IsaKernels& fastest = kernels_of(supported.front());
  if (isa == Isa::kAuto) return fastest;
  const bool is_supported = std::find(supported.begin(), supported.end(), isa) != supported.end();
  STD_TORCH_CHECK(is_supported, "this CPU does not support ISA ", static_cast<int64_t>(isa), " of linear_act");
  return kernels_of(isa);
}

}  // namespace
}  // namespace mpk
