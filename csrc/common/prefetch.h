// SPDX-License-Identifier: Apache-2.0
// Software prefetch for a loop over long arrays. Intel's own prefetchers do not keep up with a loop that computes as it reads;
// AMD's do, but for one that computes much on little, and software's only slow them down.

#pragma once

#include <cstdint>

namespace mpk {

#ifdef __x86_64__
inline const bool kPrefetches = __builtin_cpu_is("intel");
#else
inline constexpr bool kPrefetches = false;
#endif

// kBytes beyond `at`: 4 KB ahead of a read, 1 KB in each of the arrays of an update.
template <int64_t kBytes>
inline void prefetch_line(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + kBytes, /*rw=*/0, /*locality=*/kBytes < 4096 ? 3 : 2);
}

template <int64_t kBytes, class T>
inline void prefetch(const T* block, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) prefetch_line<kBytes>(block + i);
}

}  // namespace mpk
