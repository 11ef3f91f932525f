// SPDX-License-Identifier: Apache-2.0
// Cast an array on the CPU, rounding once.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace mpk {

// `from` and `to` do not overlap and need no alignment beyond their element's.
using Cast = void (*)(const void* from, void* to, int64_t n);

// Between any two of the four dtypes.
Cast find_cast(ScalarType from, ScalarType to);

// The same with non-temporal stores, for what this pass does not read again: a line that is not fetched before it is
// overwritten saves its read. Call store_fence (sfence) before another thread reads it.
Cast find_cast_non_temporal(ScalarType from, ScalarType to);
void store_fence();

}  // namespace mpk
