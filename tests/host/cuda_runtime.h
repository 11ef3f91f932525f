// SPDX-License-Identifier: Apache-2.0
// The CUDA words that the step kernels use, for a C++ compiler: each thread of a block is a fiber, blocks run one at a time.
//
// Found in place of the toolkit's header of this name. What it means is written in fibers.cpp; from CUDA's documentation, not
// from what the kernels assume.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One block at a time: a block's memory is the process's. In a section of its own, so that it can be poisoned.
#define __shared__ static __attribute__((section("mpk_shared")))

// ----- types -----

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned int x) : x(x) {}
};

// ----- inside a kernel -----

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class Wait { kNothing, kBlock, kWarp };

void wait_for(Wait what);
bool check_access(const void* address, size_t bytes, bool is_store);
void* exchange_slot(int lane_from_here);
void end_exchange();

template <class T>
T read(const T* from) {
  T value;
  std::memset(&value, 0, sizeof(value));
  if (check_access(from, sizeof(T), false)) std::memcpy(&value, from, sizeof(T));
  return value;
}

}  // namespace host

inline void __syncthreads() { host::wait_for(host::Wait::kBlock); }

// The value of the lane `delta` above, one's own where there is none. All lanes take part.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(host::exchange_slot(0), &value, sizeof(T));
  host::wait_for(host::Wait::kWarp);
  T other;
  std::memcpy(&other, host::exchange_slot(static_cast<int>(delta)), sizeof(T));
  host::end_exchange();
  return other;
}

template <class T>
T __ldg(const T* from) {
  return host::read(from);
}

template <class T>
T __ldcs(const T* from) {
  return host::read(from);
}

template <class T>
void __stcs(T* to, T value) {
  if (host::check_access(to, sizeof(T), true)) std::memcpy(to, &value, sizeof(T));
}

// ----- from the host -----

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

namespace host {

cudaError_t run(const cudaLaunchConfig_t& config, size_t argument_bytes, const std::function<void()>& thread);

}  // namespace host

// The arguments are copied, as a launch does.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  return host::run(*config, sizeof(copies), [&] { std::apply(kernel, copies); });
}
