// SPDX-License-Identifier: Apache-2.0
// Host emulator: csrc/common/cuda.cu without CUDA: one device, one stream, and the memory that the tests declare.

#include <set>

#include "common/launch.h"
#include "common/stream.h"
#include "host.h"

namespace mpk {

OnDevice::OnDevice(const Tensor&) {}

bool is_on_device(const Tensor& tensor) { return host::is_known(tensor.const_data_ptr()); }

}  // namespace mpk

namespace {

std::set<const void*> loaded;

}  // namespace

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  loaded.insert(kernel);
  return cudaSuccess;
}

// How many kernels load_kernels() would load, each counted once; 0 where it names another number.
extern "C" int64_t host_load_kernels() {
  loaded.clear();
  return mpk::KnownKernel::load_all() == static_cast<int64_t>(loaded.size()) ? loaded.size() : 0;
}
