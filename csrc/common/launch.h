// SPDX-License-Identifier: Apache-2.0
// Launch a kernel and check that it was launched: the only place that does. launch<kernel>() also makes the kernel known, so
// that all of them can be loaded before a capture, in which the CUDA runtime may not load one.

#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>

// A large parameter, which every thread reads where the launch put it.
#ifdef __CUDACC__
#define MPK_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#else
#define MPK_GRID_CONSTANT(...) const __VA_ARGS__&
#endif

namespace mpk {

// NOTE: torch's own check needs a symbol that a CPU-only torch does not have.
inline void check_cuda(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error)); }

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// A list of the kernels, made while the library is loaded.
class KnownKernel {
 public:
  explicit KnownKernel(const void* kernel) : kernel_(kernel), next_(first_) { first_ = this; }

  // Loads all of them on the current device; returns how many.
  static int64_t load_all() {
    int64_t count = 0;
    for (const KnownKernel* known = first_; known != nullptr; known = known->next_, ++count) {
      cudaFuncAttributes attributes;
      check_cuda(cudaFuncGetAttributes(&attributes, known->kernel_));
    }
    return count;
  }

 private:
  const void* kernel_;
  const KnownKernel* next_;
  inline static const KnownKernel* first_ = nullptr;
};

template <auto kKernel>
inline const KnownKernel known_kernel{reinterpret_cast<const void*>(kKernel)};

inline cudaLaunchConfig_t launch_config(unsigned grid, unsigned block, size_t shared_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

// A kernel that is chosen at run time, as tests have them: not in the list.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  const cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <auto kKernel, class... Arguments>
void launch(unsigned grid, unsigned block, size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  static_cast<void>(&known_kernel<kKernel>);  // a use, which makes it
  launch(kKernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace mpk
