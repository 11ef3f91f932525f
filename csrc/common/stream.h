// SPDX-License-Identifier: Apache-2.0
// The device and the stream that a call's kernels go to.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "tensor.h"

namespace mpk {

// While it lives, the device of `tensor` is the current one.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);

  // torch's current one
  cudaStream_t stream() const { return stream_; }

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Whether kernels can read it.
bool is_on_device(const Tensor& tensor);

// Memory for `count` S on the device of `like`, of torch's allocator, which in a CUDA graph belongs to the graph.
template <class S>
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t count)
      : memory_(torch::stable::empty(
            {count * static_cast<int64_t>(sizeof(S))}, ScalarType::Byte, std::nullopt,
            torch::stable::Device(like.is_cuda() ? torch::headeronly::DeviceType::CUDA : torch::headeronly::DeviceType::CPU,
                                  like.is_cuda() ? like.get_device_index() : -1))) {}

  S* data() const { return static_cast<S*>(memory_.mutable_data_ptr()); }

 private:
  torch::stable::Tensor memory_;
};

}  // namespace mpk
