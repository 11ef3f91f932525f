// SPDX-License-Identifier: Apache-2.0
// The passes before and after the sm_90a GEMM: grad_z = select(mask, grad_out) with its column sums (the bias gradient), and
// the sum of partial results (of column sums; of split-K, with fprop's epilogue). Every sum has one order.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "bias.cuh"
#include "common/cast.h"
#include "common/launch.h"
#include "common/vector.cuh"
#include "gemm_arguments.h"

namespace mpk {

constexpr int kSelectThreads = 256;
constexpr int kSelectVector = 8;                                              // columns of a thread
constexpr int kSelectColumns = 32 * kSelectVector;                            // of a block
constexpr int kSelectStep = kSelectThreads * kSelectVector / kSelectColumns;  // rows that a block reads at a time
constexpr int kSelectRows = 128;                                              // of a block, which writes one row of column sums

// Without a mask every element is kept.
template <class G, class T>
struct SelectArguments {
  int64_t rows, columns;
  const G* grad_out;
  int64_t grad_out_strides[2];
  bool vectors;  // grad_out lies in vectors of 16 bytes
  Mask mask;
  T* grad_z;  // in vectors of 16 bytes; or null
  int64_t grad_z_pitch;
  float* sums;  // (ceil(rows / kSelectRows), columns); or null
};

template <class G, class T>
__global__ void __launch_bounds__(kSelectThreads) select_kernel(MPK_GRID_CONSTANT(SelectArguments<G, T>) a) {
  // map block to tile
  const int64_t blocks_n = (a.columns + kSelectColumns - 1) / kSelectColumns;
  const int64_t band = blockIdx.x / blocks_n, first_column = blockIdx.x % blocks_n * kSelectColumns;
  const int lane = static_cast<int>(threadIdx.x) % 32, slice = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = first_column + lane * kSelectVector, left = a.columns - column;
  const int columns = left >= kSelectVector ? kSelectVector : left > 0 ? static_cast<int>(left) : 0;
  float sum[kSelectVector] = {};

  for (int i = slice; i < kSelectRows && columns > 0; i += kSelectStep) {
    const int64_t row = band * kSelectRows + i;
    if (row >= a.rows) break;

    // load
    const G* const from = a.grad_out + row * a.grad_out_strides[0] + column * a.grad_out_strides[1];
    Elements<G, kSelectVector> grad;
    if (a.vectors && columns == kSelectVector) {
      load<LoadStreaming>(from, grad);
    } else {
#pragma unroll
      for (int k = 0; k < kSelectVector; ++k) {
        Elements<G, 1> one;
        one.at[0] = G(0.0f);
        if (k < columns) load<LoadStreaming>(from + k * a.grad_out_strides[1], one);
        grad.at[k] = one.at[0];
      }
    }

    // select, accumulate
    const uint32_t bits =
        a.mask.words == nullptr ? ~0u : __ldg(a.mask.words + row * a.mask.pitch + column / 32) >> (column % 32);
    Elements<T, kSelectVector> grad_z;
#pragma unroll
    for (int k = 0; k < kSelectVector; ++k) {
      const float value = bits >> k & 1 ? convert<float>(grad.at[k]) : 0.0f;
      grad_z.at[k] = convert<T>(value);  // round: grad_out's dtype -> compute dtype
      sum[k] += value;
    }

    // store
    if (a.grad_z == nullptr) continue;
    T* const to = a.grad_z + row * a.grad_z_pitch + column;
    if (columns == kSelectVector) {
      store(to, grad_z);
    } else {
#pragma unroll
      for (int k = 0; k < kSelectVector; ++k) {
        if (k < columns) store(to + k, Elements<T, 1>{{grad_z.at[k]}});
      }
    }
  }

  // sums of the slices
  if (a.sums == nullptr) return;
  __shared__ float sums[kSelectStep][kSelectColumns];
#pragma unroll
  for (int k = 0; k < kSelectVector; ++k) sums[slice][lane * kSelectVector + k] = sum[k];
  __syncthreads();
  const int64_t mine = first_column + threadIdx.x;
  if (mine >= a.columns) return;
  float total = 0;
  for (int i = 0; i < kSelectStep; ++i) total += sums[i][threadIdx.x];
  __stcs(a.sums + band * a.columns + mine, total);
}
static_assert(kSelectColumns == kSelectThreads);

// That of a GEMM whose sum was split. Sums of one row have none.
struct SumEpilogue {
  BiasVector bias;
  bool relu;
  Mask mask;  // of the ReLU
  bool adds;  // to what is in out, fp32
};

// out = round(act(the sum of `count` parts + bias)), each rows x columns, `part_stride` elements from one to the next.
template <class Out>
struct SumArguments {
  const float* parts;
  int64_t count, part_stride, pitch, rows, columns;
  Out* out;
  int64_t out_stride_m, out_stride_n;
  SumEpilogue epilogue;
};

// kSlices threads share a column: each adds every kSlices-th part, then the first adds what they have.
template <class Out, int kSlices>
__global__ void __launch_bounds__(kSelectThreads) sum_kernel(MPK_GRID_CONSTANT(SumArguments<Out>) a) {
  constexpr int kColumns = kSelectThreads / kSlices;
  const int64_t blocks_n = (a.columns + kColumns - 1) / kColumns;
  const int64_t row = blockIdx.x / blocks_n;
  const int lane = static_cast<int>(threadIdx.x) % kColumns, slice = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = blockIdx.x % blocks_n * kColumns + lane;
  const float* const from = a.parts + row * a.pitch + column;
  float sum = 0;
  if (column < a.columns) {
#pragma unroll 4
    for (int64_t i = slice; i < a.count; i += kSlices) sum += __ldg(from + i * a.part_stride);
  }
  if constexpr (kSlices > 1) {
    __shared__ float sums[kSlices][kColumns];
    sums[slice][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < kSlices; ++i) sum += sums[i][lane];
  }
  Out* const to = a.out + row * a.out_stride_m + column * a.out_stride_n;
  if constexpr (kSlices == 1) {
    sum += bias_at(a.epilogue.bias, column, a.columns);
    if (a.epilogue.relu && sum <= 0) sum = 0;  // NaN stays
    if constexpr (std::is_same_v<Out, float>) {
      if (a.epilogue.adds && column < a.columns) sum += *to;
    }
  }
  Elements<Out, 1> out;
  out.at[0] = convert<Out>(sum);  // round: fp32 -> out's dtype
  if constexpr (kSlices == 1) {
    const bool positive = column < a.columns && !(convert<float>(out.at[0]) <= 0);
    if (a.epilogue.mask.words != nullptr) {
      const uint32_t word = __ballot_sync(~0u, positive);  // a warp has 32 columns
      if (lane % 32 == 0 && column < a.columns) __stcs(a.epilogue.mask.words + row * a.epilogue.mask.pitch + column / 32, word);
    }
  }
  if (slice > 0 || column >= a.columns) return;
  store(to, out);
}

}  // namespace mpk
