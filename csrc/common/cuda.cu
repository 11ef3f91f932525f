// SPDX-License-Identifier: Apache-2.0
// What only the CUDA runtime and a torch with CUDA know: device, stream, versions.

#include <dlfcn.h>

#include <tuple>

#include "launch.h"
#include "native_op.h"
#include "stream.h"

namespace mpk {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up in the library that is loaded already: linked, it would keep this one from loading under a CPU-only torch.
GetStream get_stream() {
  static const GetStream found = []() -> GetStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(found != nullptr, "this torch is built without CUDA");
  return found;
}

// (of the runtime that is linked in, of the driver), as 13000 for 13.0; the driver's is 0 where there is none.
std::tuple<int64_t, int64_t> cuda_versions() {
  int runtime = 0, driver = 0;
  check_cuda(cudaRuntimeGetVersion(&runtime));
  check_cuda(cudaDriverGetVersion(&driver));
  return {runtime, driver};
}

// Before a capture, in which the runtime may not load what is loaded lazily; returns how many kernels there are.
int64_t load_kernels(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  check_cuda(cudaSetDevice(static_cast<int>(device)));
  return KnownKernel::load_all();
}

const NativeOp registered[] = {
    {"cuda_versions", Device::kNone, cuda_versions},
    {"load_kernels", Device::kNone, load_kernels},
};

}  // namespace

OnDevice::OnDevice(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(device);
  check_cuda(cudaSetDevice(device));  // the runtime is linked statically and keeps a current device of its own
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream()(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace mpk
