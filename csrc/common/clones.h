// SPDX-License-Identifier: Apache-2.0
// Function multiversioning. MPK_CLONES: compiled for AVX-512, for AVX2 and for any x86-64; the loader picks what the CPU has.

#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MPK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MPK_CLONES
#endif

#ifdef __x86_64__
// A function of AVX2 intrinsics, to be called where has_avx2.
#define MPK_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace mpk {
inline const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
