// SPDX-License-Identifier: Apache-2.0
// MPK_CLONES: compile a loop for AVX-512, for AVX2 and for any x86-64; the loader picks what the CPU has.

#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MPK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MPK_CLONES
#endif
