// SPDX-License-Identifier: Apache-2.0
// What the host and the kernel of the sm_90a GEMM agree on: the roles, the tile shape, the kernel's argument.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"
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

// ----- tile shape -----

constexpr int kBlockM = 128, kBlockK = 64;
constexpr int kWarpgroup = 128, kConsumerWarpgroups = 2;
constexpr int kGemmThreads = kWarpgroup * (1 + kConsumerWarpgroups);
constexpr int kDescribers = kWarpgroup - 32;  // threads of the producer, beside the warp that loads
constexpr int kWarpgroupRows = 64;            // of a WGMMA, which a warpgroup executes; of one row of column sums of dgrad
constexpr int kMaxCluster = 2;                // blocks that share a tile column of b
constexpr int kGroupM = 8;                    // tile rows of a band in the tile order

// How a block computes tiles of kBlockM x N. Cooperative: its consumer warpgroups have half of the rows of each tile.
// Ping-pong: each has tiles of its own, every second one, and while one is in its epilogue the other one multiplies.
enum class KernelSchedule { kCooperative, kPingPong };

template <int N, KernelSchedule kSchedule>
struct Tile {
  static constexpr int kN = N;
  static constexpr bool kPingPong = kSchedule == KernelSchedule::kPingPong;
  static constexpr int kWarpgroups = kPingPong ? 1 : kConsumerWarpgroups;  // that multiply it
  static constexpr int kInFlight = kConsumerWarpgroups / kWarpgroups;      // tiles that are computed at a time
  static constexpr int kParts = kBlockM / kWarpgroupRows / kWarpgroups;    // of it, each of kWarpgroupRows, by a warpgroup
  static constexpr int kStages = N == 128 ? 6 : 4;                         // of operands
  static constexpr int kDescriptions = 2 * kInFlight;                      // of tiles
  // Of arithmetic with a thread's index. Unsigned, it is so short that ptxas repeats it, and keeps nothing of it in registers.
  using ThreadIndex = std::conditional_t<kPingPong, unsigned, int>;

  // Of a part of a warpgroup's, in the tile.
  static MPK_HOST_DEVICE constexpr int first_row(int warpgroup, int part) {
    return (warpgroup % kWarpgroups * kParts + part) * kWarpgroupRows;
  }
};

// A workspace of split-K holds whole clusters of tiles, one split below the other.
constexpr int kSplitAlignment = kMaxCluster * kBlockM;

// ----- the argument -----

struct BiasVector {
  const char* data;  // or null
  int64_t stride;    // elements
  torch::headeronly::ScalarType dtype;
};

struct Mask {
  uint32_t* words;  // or null
  int64_t pitch;    // words
};

struct GemmArguments {
  TensorMap a, b, out;
  int M, N, K;
  int cluster;             // blocks that share b: 1 or 2
  int splits, split_rows;  // split-K: the partial results lie one below the other, split_rows apart
  BiasVector bias;         // fprop
  bool relu;               // fprop
  Mask mask;               // written by fprop, read by dgrad
  float* column_sums;      // dgrad: (ceil(M / kWarpgroupRows), N); or null
  const float* added_to;   // wgrad: the memory of out; or null
  int64_t added_to_pitch;  // elements
};

}  // namespace mpk
