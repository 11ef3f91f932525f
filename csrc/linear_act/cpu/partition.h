// SPDX-License-Identifier: Apache-2.0
// How loops of linear_act on the CPU are divided into equal parts and among threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace mpk {
namespace {

// [0, size) in `count` segments of one length, a multiple of `unit` and at most `max_length`; at least `min_count` of them if
// there are that many units.
struct Partition {
  Partition(int64_t size, int64_t max_length, int64_t unit, int64_t min_count) {
    const int64_t segments = std::max((size + max_length - 1) / max_length, min_count);
    length = ((size + segments - 1) / segments + unit - 1) / unit * unit;
    count = (size + length - 1) / length;
  }
  int64_t length, count;
};

// To wake a thread for less than this costs more than it saves.
constexpr int64_t kProductsPerThread = 1 << 20;
constexpr int64_t kElementsPerThread = 1 << 15;  // as in torch

int64_t threads_for(int64_t work, int64_t per_thread) {
  return std::min<int64_t>(torch::stable::get_num_threads(), work / per_thread + 1);
}

}  // namespace
}  // namespace mpk
