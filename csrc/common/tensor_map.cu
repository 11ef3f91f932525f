// SPDX-License-Identifier: Apache-2.0
// Tensor maps, encoded by the driver. Its function is looked up at the first call, so that the library loads without a driver.

#include <cuda.h>

#include <array>
#include <cstring>
#include <utility>

#include "launch.h"
#include "tensor_map.h"

namespace mpk {
namespace {

using torch::headeronly::ScalarType;

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
  check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
  STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && found != nullptr, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<Encode>(found);
}

struct Key {
  const void* data;
  int64_t rows, columns, pitch;
  int box_rows;
  ScalarType dtype;

  bool operator==(const Key& other) const {
    return data == other.data && rows == other.rows && columns == other.columns && pitch == other.pitch &&
           box_rows == other.box_rows && dtype == other.dtype;
  }
};

CUtensorMapDataType data_type(ScalarType dtype) {
  if (dtype == ScalarType::Half) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (dtype == ScalarType::BFloat16) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, "no tensor map for this dtype");
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

TensorMap encode(const Key& key) {
  static const Encode encode_tiled = find_encode();
  const cuuint64_t bytes = key.dtype == ScalarType::Float ? 4 : 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(key.columns), static_cast<cuuint64_t>(key.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(key.pitch) * bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(key.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  TensorMap map;
  static_assert(sizeof(map) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const CUresult result =
      encode_tiled(reinterpret_cast<CUtensorMap*>(&map), data_type(key.dtype), 2, const_cast<void*>(key.data), sizes, pitches,
                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses ", key.rows, " x ", key.columns, ", pitch ",
                  key.pitch, ": CUDA error ", static_cast<int>(result));
  return map;
}

}  // namespace

// A cache per thread: a layer's weight stays where it is, and the allocator reuses the addresses of activations.
TensorMap encode_tensor_map(const void* data, ScalarType dtype, int64_t rows, int64_t columns, int64_t pitch, int box_rows) {
  constexpr size_t kSlots = 64;  // a power of two
  thread_local std::array<std::pair<Key, TensorMap>, kSlots> cache{};
  const Key key{data, rows, columns, pitch, box_rows, dtype};
  const uint64_t hash = (reinterpret_cast<uintptr_t>(data) >> 4 ^ rows * 31 ^ columns * 17 ^ box_rows) * 0x9e3779b97f4a7c15u;
  auto& slot = cache[hash >> 58];
  if (!(slot.first == key)) slot = {key, encode(key)};
  return slot.second;
}

}  // namespace mpk
