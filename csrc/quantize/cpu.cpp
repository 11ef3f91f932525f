// SPDX-License-Identifier: Apache-2.0
// quantize on the CPU. x is (outer, n, inner), contiguous, and n is reduced away; a row or a block of columns is read for its
// largest magnitude, and again, from the cache where it fits, to be encoded.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/cast.h"
#include "../common/clones.h"
#include "../common/native_op.h"
#include "format.h"

namespace mpk {
namespace {

constexpr int64_t kBlock = 2048;     // numbers that are widened to fp32 at once
constexpr int64_t kChunk = 1 << 15;  // numbers that are worth a thread

MPK_CLONES int32_t largest_magnitude(const float* x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, c10::bit_cast<int32_t>(x[i]) & kMagnitudeBits);
  return largest;
}

MPK_CLONES void largest_magnitudes(const float* x, int64_t n, int32_t* largest) {
  for (int64_t i = 0; i < n; ++i) largest[i] = std::max(largest[i], c10::bit_cast<int32_t>(x[i]) & kMagnitudeBits);
}

// The product is exact, or so small that it becomes 0.
template <class F>
MPK_CLONES void encode_all(const float* x, float inv_scale, uint8_t* q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) q[i] = encode<F>(x[i] * inv_scale);
}

template <class F>
MPK_CLONES void encode_each(const float* x, const float* inv_scale, uint8_t* q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) q[i] = inv_scale[i] == inv_scale[i] ? encode<F>(x[i] * inv_scale[i]) : kNan8;
}

struct Input {
  const char* data;
  int64_t element;
  Cast widen;  // null for fp32

  // Numbers [at, at + n), n <= kBlock; in `buffer` where they are not fp32 as they lie.
  const float* block(int64_t at, int64_t n, float* buffer) const {
    if (widen == nullptr) return reinterpret_cast<const float*>(data) + at;
    widen(data + at * element, buffer, n);
    return buffer;
  }
};

int32_t largest_magnitude(const Input& x, int64_t begin, int64_t end) {
  float buffer[kBlock];
  int32_t largest = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    largest = std::max(largest, largest_magnitude(x.block(at, n, buffer), n));
  }
  return largest;
}

template <class F>
void encode_range(const Input& x, float scale, uint8_t* q, int64_t begin, int64_t end) {
  if (scale != scale) {
    std::memset(q + begin, kNan8, end - begin);
    return;
  }
  float buffer[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    encode_all<F>(x.block(at, n, buffer), 1 / scale, q + at, n);
  }
}

// One scale for all: every chunk's largest magnitude, then every chunk.
template <class F>
void quantize_whole(const Input& x, int64_t n, uint8_t* q, float* scale) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<int32_t> largest(chunks);
  const auto for_each_chunk = [&](const auto& f) {
    torch::stable::parallel_for(0, chunks, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i * kChunk, std::min((i + 1) * kChunk, n));
    });
  };
  for_each_chunk([&](int64_t i, int64_t begin, int64_t end) { largest[i] = largest_magnitude(x, begin, end); });
  *scale = scale_of<F>(*std::max_element(largest.begin(), largest.end()));
  for_each_chunk([&](int64_t, int64_t begin, int64_t end) { encode_range<F>(x, *scale, q, begin, end); });
}

template <class F>
void quantize_rows(const Input& x, int64_t rows, int64_t n, uint8_t* q, float* scale) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(kChunk / n, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scale[row] = scale_of<F>(largest_magnitude(x, row * n, (row + 1) * n));
      encode_range<F>(x, scale[row], q, row * n, (row + 1) * n);
    }
  });
}

// `count` columns, at most kBlock, from the one that begins at `at`; a row is `inner` numbers.
template <class F>
void quantize_columns(const Input& x, int64_t at, int64_t n, int64_t inner, int64_t count, uint8_t* q, float* scale) {
  float buffer[kBlock], inv_scale[kBlock];
  int32_t largest[kBlock] = {};
  for (int64_t row = 0; row < n; ++row) largest_magnitudes(x.block(at + row * inner, count, buffer), count, largest);
  for (int64_t i = 0; i < count; ++i) {
    scale[i] = scale_of<F>(largest[i]);
    inv_scale[i] = 1 / scale[i];
  }
  for (int64_t row = 0; row < n; ++row) {
    const int64_t from = at + row * inner;
    encode_each<F>(x.block(from, count, buffer), inv_scale, q + from, count);
  }
}

template <class F>
void quantize_as(const Input& x, int64_t outer, int64_t n, int64_t inner, uint8_t* q, float* scale) {
  if (inner == 1) return outer == 1 ? quantize_whole<F>(x, n, q, scale) : quantize_rows<F>(x, outer, n, q, scale);
  const int64_t blocks = (inner + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(kChunk / (n * std::min(inner, kBlock)), 1);
  torch::stable::parallel_for(0, outer * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t matrix = i / blocks, first = i % blocks * kBlock;
      const int64_t count = std::min(kBlock, inner - first);
      quantize_columns<F>(x, matrix * n * inner + first, n, inner, count, q, scale + matrix * inner + first);
    }
  });
}

// q: the bytes of the result. All are contiguous.
void quantize(Tensor x, int64_t outer, int64_t n, int64_t inner, int64_t mantissa, Tensor q, Tensor scale) {
  STD_TORCH_CHECK(outer > 0 && n > 0 && inner > 0 && x.numel() == outer * n * inner && q.numel() == x.numel() &&
                      scale.numel() == outer * inner,
                  "x and q must have outer * n * inner elements, not none, and scale outer * inner");
  STD_TORCH_CHECK(x.is_contiguous() && q.is_contiguous() && scale.is_contiguous(), "x, q and scale must be contiguous");
  const ScalarType dtype = x.scalar_type();
  const Input input{static_cast<const char*>(x.const_data_ptr()), size_of(dtype),
                    dtype == ScalarType::Float ? nullptr : find_cast(dtype, ScalarType::Float)};
  const auto run = mantissa == E4M3::kMantissa ? quantize_as<E4M3> : quantize_as<E5M2>;
  run(input, outer, n, inner, q.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>());
}

const NativeOp registered("quantize", Device::kCpu, quantize);

}  // namespace
}  // namespace mpk
