// SPDX-License-Identifier: Apache-2.0
// Many tensors in one launch: a table by value in the kernel's argument, and one block for each chunk of a tensor.
//
// By value, because a table in a buffer would have to outlive the launch, and in a CUDA graph every replay.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace mpk {

constexpr int kThreads = 256;             // in a block of every kernel of the step
constexpr size_t kArgumentBytes = 32764;  // what CUDA takes as a kernel's argument
constexpr int kMostTensors = 640;
constexpr int64_t kChunkUnit = 16384;  // elements; chunks are multiples of it, and so of every vector

// A segment of one tensor: elements [begin, end).
struct TensorChunk {
  int tensor;
  int64_t begin, end;
};

// kLists pointers a tensor; kOtherBytes are left for the kernel's other arguments.
template <int kLists, size_t kOtherBytes>
struct TensorTable {
  static constexpr size_t kBytesEach = kLists * sizeof(void*) + sizeof(int64_t) + 2 * sizeof(int32_t) + 2;
  static constexpr int kCapacity = std::min<int>(kMostTensors, (kArgumentBytes - kOtherBytes) / kBytesEach);

  char* data[kLists][kCapacity];
  int64_t numel[kCapacity];
  int32_t first_chunk[kCapacity];
  int32_t row[kCapacity];  // its place in the lists of the call
  ScalarType grad_dtype[kCapacity], copy_dtype[kCapacity];
  int64_t chunk_length;
  int32_t count, chunks;

  void clear(int64_t length) {
    chunk_length = length;
    count = chunks = 0;
  }

  bool is_full() const { return count == kCapacity; }

  // The index at which the caller writes `data` and dtypes. A tensor without elements owns a chunk too, of none.
  int add(int64_t row_in_call, int64_t elements) {
    numel[count] = elements;
    first_chunk[count] = chunks;
    row[count] = static_cast<int32_t>(row_in_call);
    chunks += std::max(static_cast<int32_t>((elements + chunk_length - 1) / chunk_length), 1);
    return count++;
  }

  MPK_HOST_DEVICE int64_t end_chunk(int tensor) const { return tensor + 1 < count ? first_chunk[tensor + 1] : chunks; }

  // Of the last tensor that starts at or before `chunk`.
  MPK_HOST_DEVICE TensorChunk find(int chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t begin = (chunk - first_chunk[low]) * chunk_length, end = begin + chunk_length;
    return {low, begin, end < numel[low] ? end : numel[low]};
  }
};

}  // namespace mpk
