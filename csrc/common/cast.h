// SPDX-License-Identifier: Apache-2.0
// Cast a run of elements on the CPU, rounding once.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace mpk {

// `from` and `to` do not overlap and need no alignment beyond their element's.
using Cast = void (*)(const void* from, void* to, int64_t n);

// Between any two of the four dtypes.
Cast find_cast(ScalarType from, ScalarType to);

// The same, but what is written does not enter the cache: nobody reads it in this pass, and a line that is not fetched before
// it is overwritten saves its read. Call fence_stores before another thread reads it.
Cast find_cast_past_cache(ScalarType from, ScalarType to);
void fence_stores();

}  // namespace mpk
