// SPDX-License-Identifier: Apache-2.0
// What the host and the kernel of the sm_90a GEMM agree on: the roles, the tile shape, the kernel's argument.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "common/tensor_map.h"

namespace mpk {

// out (M x N) = epilogue(a (M x K) b (K x N)), by the sizes of the GEMM, which differ from those of the layer:
//
//                a                b             epilogue
//   fprop        x                weight.T      bias, ReLU, mask of the rounded output
//   dgrad        grad_z           weight        masked by the previous layer's ReLU; column sums of the result
//   wgrad        grad_z.T         x             added to what is in out, or none; split-K
enum class Role { kFprop, kDgrad, kWgrad };

// An operand is K-major where its memory is contiguous along K; WGMMA calls the other kind transposed.
constexpr bool is_a_transposed(Role role) { return role == Role::kWgrad; }
constexpr bool is_b_transposed(Role role) { return role != Role::kFprop; }

// ----- tile shape: BLOCK_N, 128, 192 or 256, is a template parameter -----

constexpr int kBlockM = 128, kBlockK = 64;
constexpr int kWarpgroup = 128, kConsumerWarpgroups = 2;
constexpr int kGemmThreads = kWarpgroup * (1 + kConsumerWarpgroups);
constexpr int kDescribers = kWarpgroup - 32;                   // threads of the producer, beside the warp that loads
constexpr int kWarpgroupRows = kBlockM / kConsumerWarpgroups;  // of a consumer; of one row of column sums of dgrad
constexpr int kMaxCluster = 2;                                 // blocks that share a tile column of b
constexpr int kTileStages = 2;                                 // descriptions of tiles in flight
constexpr int kGroupM = 8;                                     // tile rows of a band in the tile order

// A workspace of split-K holds whole clusters of tiles, one split below the other.
constexpr int kSplitAlignment = kMaxCluster * kBlockM;

// ----- the argument -----

struct BiasVector {
  const char* data;  // or null
  int64_t stride;    // elements
  torch::headeronly::ScalarType dtype;
};

struct GemmArguments {
  TensorMap a, b, out;
  int M, N, K;
  int cluster;             // blocks that share b: 1 or 2
  int splits, split_rows;  // split-K: the partial results lie one below the other, split_rows apart
  BiasVector bias;         // fprop
  bool relu;               // fprop
  uint32_t* mask;          // written by fprop, read by dgrad; or null
  int64_t mask_pitch;      // words
  float* column_sums;      // dgrad: (ceil(M / kWarpgroupRows), N); or null
  const float* added_to;   // wgrad: the memory of out; or null
  int64_t added_to_pitch;  // elements
};

}  // namespace mpk
