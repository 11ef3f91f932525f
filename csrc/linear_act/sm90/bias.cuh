// SPDX-License-Identifier: Apache-2.0
// An element of the bias, whatever its dtype, in fp32.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cast.h"
#include "common/vector.cuh"
#include "gemm_arguments.h"

namespace mpk {

template <class T>
__device__ __forceinline__ float bias_as(const char* data, int64_t i) {
  Elements<T, 1> one;
  load<LoadReadOnly>(reinterpret_cast<const T*>(data) + i, one);
  return convert<float>(one.at[0]);
}

// 0 without a bias and outside of it.
__device__ __forceinline__ float bias_at(const BiasVector& bias, int64_t column, int64_t columns) {
  if (bias.data == nullptr || column >= columns) return 0;
  const int64_t i = column * bias.stride;
  if (bias.dtype == ScalarType::Half) return bias_as<Half>(bias.data, i);
  if (bias.dtype == ScalarType::BFloat16) return bias_as<BFloat16>(bias.data, i);
  if (bias.dtype == ScalarType::Float) return bias_as<float>(bias.data, i);
  return bias_as<double>(bias.data, i);
}

}  // namespace mpk
