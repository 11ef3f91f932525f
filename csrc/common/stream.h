// SPDX-License-Identifier: Apache-2.0
// The device and the stream that a call's kernels go to.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace mpk {

// While it lives, the device of `tensor` is the current one.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor);

  // torch's current one
  cudaStream_t stream() const { return stream_; }

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Whether kernels can read it.
bool is_on_device(const torch::stable::Tensor& tensor);

// Memory for `count` S on the device of `like`, of torch's allocator, which in a CUDA graph belongs to the graph.
template <class S>
torch::stable::Tensor scratch(const torch::stable::Tensor& like, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(S));
  return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

}  // namespace mpk
