// SPDX-License-Identifier: Apache-2.0
// What headers of libstdc++ ask glibc 2.32 and later: whether the process has one thread only, so that counts of
// references need no atomic instruction. Answered here, by no, so that the library runs where an older glibc is.

extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
