// SPDX-License-Identifier: Apache-2.0
// Wrong kernels, each with one defect that the host emulator must detect.

#include <cuda_runtime.h>

#include <exception>
#include <string>

#include "common/launch.h"

namespace {

using mpk::launch;

constexpr int kThreads = 64;

// No barrier between the write of thread 0 and the reads of the others.
__global__ void reads_too_early(unsigned* out) {
  __shared__ unsigned value;
  if (threadIdx.x == 0) value = 7;
  __stcs(out + threadIdx.x, value);
}

// The same with the barrier: correct.
__global__ void reads_after_barrier(unsigned* out) {
  __shared__ unsigned value;
  if (threadIdx.x == 0) value = 7;
  __syncthreads();
  __stcs(out + threadIdx.x, value);
}

// A warp reduction: lane 0 gets 0 + ... + 31.
__global__ void adds_lanes(unsigned* out) {
  unsigned sum = threadIdx.x % 32;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
  __stcs(out + threadIdx.x, threadIdx.x % 32 == 0 ? sum : 0);
}

// One lane waits for the block while the rest of its warp waits for that lane.
__global__ void hangs(unsigned* out) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __shfl_down_sync(~0u, threadIdx.x, 1);
  }
}

__global__ void reads_past_the_end(unsigned* out) { __ldcs(out + threadIdx.x + 1); }

__global__ void writes_past_the_end(unsigned* out) { __stcs(out + threadIdx.x + 1, 0u); }

__global__ void reads_unaligned(unsigned* out) { __ldcs(reinterpret_cast<uint4*>(out + threadIdx.x % 16)); }

// A ticket with what the block stored not released, and with what the others stored not acquired.
__global__ void releases_nothing(unsigned* out) {
  if (threadIdx.x > 0) return;
  __stcg(out + 1, 7u);
  atomicInc(out, 1);
}

__global__ void acquires_nothing(unsigned* out) {
  if (threadIdx.x > 0) return;
  atomicInc(out, 1);
  __ldcg(out + 1);
}

__global__ void acquires_nothing_for_block(unsigned* out) {
  if (threadIdx.x == 0) atomicInc(out, 1);
  __syncthreads();
}

using Kernel = void (*)(unsigned*);
constexpr Kernel kKernels[] = {reads_after_barrier, adds_lanes,
                               reads_too_early,     hangs,
                               reads_past_the_end,  writes_past_the_end,
                               reads_unaligned,     releases_nothing,
                               acquires_nothing,    acquires_nothing_for_block};

}  // namespace

// Run one: the error of the launch, or an empty string.
extern "C" const char* host_run_kernel(int which, unsigned* out) {
  static std::string message;
  message.clear();
  try {
    launch(kKernels[which], 1, kThreads, 0, nullptr, out);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
