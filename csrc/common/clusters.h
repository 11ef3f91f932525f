// SPDX-License-Identifier: Apache-2.0
// Launch a kernel of sm_90 in thread block clusters.

#pragma once

#include "launch.h"

namespace mpk {

// `cluster` blocks per cluster; it divides the grid. Dynamic shared memory may exceed 48 KB.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned grid, unsigned cluster, unsigned block, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <auto kKernel, class... Arguments>
void launch_clusters(unsigned grid, unsigned cluster, unsigned block, size_t shared_bytes, cudaStream_t stream,
                     const Arguments&... arguments) {
  static_cast<void>(&known_kernel<kKernel>);
  launch_clusters(kKernel, grid, cluster, block, shared_bytes, stream, arguments...);
}

}  // namespace mpk
