// SPDX-License-Identifier: Apache-2.0
// Host emulator: the part of the CUDA runtime that the kernels use, for a C++ compiler. Each thread is a fiber; clusters of
// blocks run one after the other.
//
// Found in place of the toolkit's header of this name. fibers.cpp implements it from CUDA's documentation, not from what the
// kernels assume.

#pragma once

#include <algorithm>
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
#define __forceinline__ inline
#define __launch_bounds__(...)
// Static, as one block runs at a time; in a section of its own, so that it can be poisoned.
#define __shared__ static __attribute__((section("mpk_shared")))

#define CUDART_VERSION 13000

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

using std::max;

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

bool sync_block(bool value);  // whether that of any thread is true
void sync_warp(const char* where);
void check_access(const void* address, size_t bytes, bool is_store);

// Fences of the GPU's memory, by the thread: what it stored for other blocks, before its atomic, and after it what they stored.
void on_store_for_blocks();
void on_load_of_blocks();
void on_atomic();
void fence();

// 32 bytes per lane that the other lanes read: write the own slot, sync_warp, read other slots, end_exchange.
void* exchange_slot(unsigned lane);
unsigned lane();
void end_exchange();

template <class T>
T read(const T* from) {
  check_access(from, sizeof(T), false);
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// The value of lane `from`. All lanes take part.
template <class T>
T exchange(T value, unsigned from, const char* where) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(exchange_slot(lane()), &value, sizeof(T));
  sync_warp(where);
  T other;
  std::memcpy(&other, exchange_slot(from), sizeof(T));
  end_exchange();
  return other;
}

}  // namespace host

inline void __syncthreads() { host::sync_block(false); }
inline int __syncthreads_or(int value) { return host::sync_block(value != 0); }
inline void __threadfence() { host::fence(); }

// NOTE: only for a ticket that other blocks' stores and loads are ordered by.
inline unsigned atomicInc(unsigned* address, unsigned most) {
  host::on_atomic();
  const unsigned old = *address;
  *address = old >= most ? 0 : old + 1;
  return old;
}

// The value of the lane `delta` above, or the lane's own if there is none.
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned from = host::lane() + delta;
  return host::exchange(value, from < 32 ? from : host::lane(), "a shuffle");
}

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned lanes) {
  return host::exchange(value, host::lane() ^ lanes, "a shuffle");
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return host::exchange(value, static_cast<unsigned>(lane) % 32, "a shuffle");
}

// A bit of each lane. All lanes take part.
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned{host::exchange<unsigned>(predicate, lane, "a vote")} << lane;
  return bits;
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
  host::check_access(to, sizeof(T), true);
  std::memcpy(to, &value, sizeof(T));
}

// NOTE: only of memory that the kernel's host allocates for its blocks, which the tests do not declare.
template <class T>
T __ldcg(const T* from) {
  host::on_load_of_blocks();
  return *from;
}

template <class T>
void __stcg(T* to, T value) {
  host::on_store_for_blocks();
  *to = value;
}

// ----- from the host -----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

// Entry points of the driver, by name.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);

namespace host {

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, size_t argument_bytes,
                const std::function<void()>& thread);
cudaError_t set_max_shared(const void* kernel, int bytes);

}  // namespace host

struct cudaFuncAttributes {};
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return host::set_max_shared(reinterpret_cast<const void*>(kernel), value);
}

// The arguments are copied, as a launch copies them.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  return host::run(*config, reinterpret_cast<const void*>(kernel), sizeof(copies), [&] { std::apply(kernel, copies); });
}
