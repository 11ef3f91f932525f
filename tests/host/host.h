// SPDX-License-Identifier: Apache-2.0
// What the stand-in knows besides the CUDA words: which memory is the device's, and what a kernel moved.

#pragma once

#include <cstdint>

namespace host {

struct Counts {
  int64_t launches;
  int64_t accesses, loaded, stored;  // those of vector.cuh, and the bytes they moved
};

// Whether the address is in the device's memory.
bool is_known(const void* address);

}  // namespace host
