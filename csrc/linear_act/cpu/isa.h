// SPDX-License-Identifier: Apache-2.0
// The instruction sets that linear_act's CPU GEMM has micro-kernels for, and which of them the compiler and this CPU support.

#pragma once

#include <cstdint>
#include <vector>

#include "../../common/clones.h"

// x86 intrinsics in functions compiled for another target than their file: clang would need an attribute on each function.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MPK_X86_KERNELS
#include <immintrin.h>
// VDPBF16PS and TDPBF16PS, which older compilers do not know; AMX also needs Linux's permission.
#if defined(__linux__) && __GNUC__ >= 12
#define MPK_BF16_DOT_KERNELS
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mpk {
namespace {

// kAuto: the fastest here. The two portable ones serve any CPU; kPortableVnni emulates the bf16 dot-product, for tests.
enum class Isa : int64_t { kAuto, kPortable, kPortableVnni, kAvx2, kAvx512, kAvx512Bf16, kAmx };

#ifdef MPK_X86_KERNELS
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef MPK_BF16_DOT_KERNELS
// Linux grants the AMX tile registers, 8 KB of state per thread, to processes that ask for them.
inline bool has_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Those that this CPU has, the fastest first.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
#ifdef MPK_X86_KERNELS
  if (has_avx2) {
    if (has_avx512()) {
      found.push_back(Isa::kAvx512);
#ifdef MPK_BF16_DOT_KERNELS
      // On Intel's CPUs AVX-512 BF16 is slower than fp32 products by AVX-512.
      const bool is_slow = __builtin_cpu_is("intel");
      if (__builtin_cpu_supports("avx512bf16")) found.insert(is_slow ? found.end() : found.begin(), Isa::kAvx512Bf16);
      if (has_amx()) found.insert(found.begin(), Isa::kAmx);
#endif
    }
    found.push_back(Isa::kAvx2);
  }
#endif
  found.insert(found.end(), {Isa::kPortable, Isa::kPortableVnni});
  return found;
}

}  // namespace
}  // namespace mpk
