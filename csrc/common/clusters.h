// SPDX-License-Identifier: Apache-2.0
// Launch a kernel of sm_90 in thread block clusters.

#pragma once

#include <atomic>

#include "launch.h"

namespace mpk {

// Lets a kernel have more than 48 KB of dynamic shared memory on the current device.
template <class... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// The same once for a device.
template <auto kKernel>
void allow_shared_bytes_once(size_t bytes) {
  constexpr int kDevices = 64;  // of others, at every call
  static std::atomic<bool> is_allowed[kDevices];
  int device;
  check_cuda(cudaGetDevice(&device));
  if (device < kDevices && is_allowed[device].load(std::memory_order_relaxed)) return;
  allow_shared_bytes(kKernel, bytes);
  if (device < kDevices) is_allowed[device].store(true, std::memory_order_relaxed);
}

// `cluster` blocks per cluster; it divides the grid.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned grid, unsigned cluster, unsigned block, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <auto kKernel, class... Arguments>
void launch_clusters(unsigned grid, unsigned cluster, unsigned block, size_t shared_bytes, cudaStream_t stream,
                     const Arguments&... arguments) {
  static_cast<void>(&known_kernel<kKernel>);
  allow_shared_bytes_once<kKernel>(shared_bytes);
  launch_clusters(kKernel, grid, cluster, block, shared_bytes, stream, arguments...);
}

}  // namespace mpk
