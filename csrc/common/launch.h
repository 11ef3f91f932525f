// SPDX-License-Identifier: Apache-2.0
// Launch a kernel and check that it was launched: the only place that does.

#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>

// A large parameter, which every thread reads where the launch put it.
#ifdef __CUDACC__
#define MPK_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#else
#define MPK_GRID_CONSTANT(...) const __VA_ARGS__&
#endif

namespace mpk {

// NOTE: torch's own check needs a symbol that a CPU-only torch does not have.
inline void check_cuda(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error)); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace mpk
