// SPDX-License-Identifier: Apache-2.0
// A list of tensors in one parallel region: their elements are laid end to end and cut into chunks of equal length.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "tensor_list.h"

namespace mpk {

// Where the cuts lie depends on the sizes alone, so that a sum over segments has the same bits with any number of threads.
class ChunkPartition {
 public:
  static constexpr int64_t kLength = 16384;  // elements; a multiple of kAlign
  static constexpr int64_t kAlign = 64;      // each tensor starts at a multiple, so that cuts keep its cache lines whole

  explicit ChunkPartition(const TensorList& tensors) : starts_(1, 0) {
    numels_.reserve(tensors.size());
    starts_.reserve(tensors.size() + 1);
    for (int64_t i = 0; i < tensors.size(); ++i) {
      const int64_t numel = tensors.numel(i);
      numels_.push_back(numel);
      starts_.push_back(starts_.back() + (numel + kAlign - 1) / kAlign * kAlign);
    }
  }

  // A segment is the part of a tensor that lies in one chunk. From segment to segment either the tensor or the chunk goes up by
  // one, so that their sum numbers the segments.
  int64_t segments() const { return static_cast<int64_t>(numels_.size()) + count(); }
  int64_t first_segment(int64_t tensor) const { return tensor + starts_[tensor] / kLength; }
  int64_t last_segment(int64_t tensor) const { return tensor + (starts_[tensor + 1] - 1) / kLength; }
  int64_t numel(int64_t tensor) const { return numels_[tensor]; }

  // f(tensor, begin, end, segment) for every segment, elements [begin, end) of the tensor.
  template <class F>
  void parallel_for_each(const F& f) const {
    torch::stable::parallel_for(0, count(), /*grain_size=*/2, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) for_each_in(chunk, f);
    });
  }

 private:
  int64_t count() const { return (starts_.back() + kLength - 1) / kLength; }

  template <class F>
  void for_each_in(int64_t chunk, const F& f) const {
    const int64_t low = chunk * kLength, high = low + kLength;
    int64_t tensor = std::upper_bound(starts_.begin(), starts_.end(), low) - starts_.begin() - 1;
    for (; tensor < static_cast<int64_t>(numels_.size()) && starts_[tensor] < high; ++tensor) {
      const int64_t begin = std::max<int64_t>(low - starts_[tensor], 0);
      const int64_t end = std::min(high - starts_[tensor], numels_[tensor]);
      if (begin < end) f(tensor, begin, end, tensor + chunk);
    }
  }

  std::vector<int64_t> numels_, starts_;
};

}  // namespace mpk
