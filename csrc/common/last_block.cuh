// SPDX-License-Identifier: Apache-2.0
// The last block of a launch to be done goes on with what all have found, in place of a further launch. Which block that is
// depends on the schedule; what it does with the others' results, in which order, must not.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace mpk {

// For other blocks of the launch to read, in the L2 cache, which all SMs share.
template <class S>
__device__ inline void store_for_blocks(S* to, const S& from) {
  static_assert(sizeof(S) % sizeof(double) == 0);
  double words[sizeof(S) / sizeof(double)];
  memcpy(words, &from, sizeof(from));
#pragma unroll
  for (size_t i = 0; i < sizeof(S) / sizeof(double); ++i) __stcg(reinterpret_cast<double*>(to) + i, words[i]);
}

template <class S>
__device__ inline S load_of_blocks(const S* from) {
  static_assert(sizeof(S) % sizeof(double) == 0);
  double words[sizeof(S) / sizeof(double)];
#pragma unroll
  for (size_t i = 0; i < sizeof(S) / sizeof(double); ++i) words[i] = __ldcg(reinterpret_cast<const double*>(from) + i);
  S to;
  memcpy(&to, words, sizeof(to));
  return to;
}

// Whether this block is the last of `count` to come to `ticket`, which is 0 before the first and again after the last. What
// the thread 0 of each block stored before is then visible to all threads of this one. By all threads; a barrier.
__device__ inline bool is_last_block(unsigned* ticket, unsigned count) {
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();  // release: what this block stored
    is_last = atomicInc(ticket, count - 1) == count - 1;
    __threadfence();  // acquire: what the others stored
  }
  return __syncthreads_or(is_last);
}

}  // namespace mpk
