// SPDX-License-Identifier: Apache-2.0
// Host emulator: what is not CUDA's API: which memory is the device's, and how much a kernel moved.

#pragma once

#include <cstddef>
#include <cstdint>

namespace host {

struct Counts {
  int64_t launches;
  int64_t accesses, loaded, stored;  // those of vector.cuh, and the bytes they moved
  int64_t tma_loaded, tma_stored;    // bytes of tensors that TMA moved; a multicast counts once
  int64_t attributes;                // of kernels, set by the host
};

extern Counts counts;

// Whether the address is in the device's memory.
bool is_known(const void* address);

// Fails the launch if the tests do not allow the access.
void check_range(const void* address, size_t bytes, bool is_store);

}  // namespace host
