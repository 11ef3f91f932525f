// SPDX-License-Identifier: Apache-2.0
// Host emulator: the PTX wrappers of csrc/common/sm90.cuh for a C++ compiler, found in its place; implemented in
// tests/emulator/sm90.cpp. Source: the PTX ISA, not the PTX of that file.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cast.h"
#include "common/tensor_map.h"

namespace mpk::sm90 {

using Barrier = uint64_t;

// ----- shared memory -----

uint8_t* dynamic_shared();
uint32_t shared_address(const void* shared);
void store_shared(void* shared, float first, float second);
void load_shared(const void* shared, uint32_t (&words)[4]);
void stmatrix_x4(void* shared, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3);
void fence_proxy_async();

// ----- barriers -----

void named_barrier_sync(int id, int threads);
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait();
uint32_t cluster_rank();

void barrier_init(Barrier* barrier, uint32_t arrivals);
void fence_barrier_init();
void barrier_arrive(Barrier* barrier);
void barrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes);
void barrier_arrive_cluster(Barrier* barrier, uint32_t rank);
void barrier_wait(Barrier* barrier, uint32_t parity);

// ----- TMA -----

void tma_prefetch(const TensorMap* map);
void tma_load(void* shared, const TensorMap* map, Barrier* barrier, int32_t c0, int32_t c1);
void tma_load_multicast(void* shared, const TensorMap* map, Barrier* barrier, int32_t c0, int32_t c1, uint16_t blocks);
void tma_store(const TensorMap* map, const void* shared, int32_t c0, int32_t c1);
void tma_store_commit();
void tma_store_wait(int groups, bool only_read);

template <int N>
void tma_store_wait_read() {
  tma_store_wait(N, /*only_read=*/true);
}

template <int N>
void tma_store_wait() {
  tma_store_wait(N, /*only_read=*/false);
}

// ----- warps and registers -----

template <class T>
T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(~0u, value, lanes);
}

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(~0u, value, lane);
}

inline void sync_warp() { host::sync_warp("__syncwarp"); }

template <int N>
void setmaxnreg_inc() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
}
template <int N>
void setmaxnreg_dec() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
}

inline float relu(float x) { return x > 0 || x != x ? x : 0.0f; }

// A NaN becomes 0x7fff.
template <class T>
uint16_t round_to(float x) {
  if (x != x) return 0x7fff;
  const T rounded = convert<T>(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

template <class T>
uint32_t pack(float lo, float hi) {
  return round_to<T>(lo) | static_cast<uint32_t>(round_to<T>(hi)) << 16;
}

// NOTE: -0 stays -0: the sign of a zero result is unspecified.
template <class T>
uint32_t pack_relu(float lo, float hi) {
  return pack<T>(lo < 0 ? 0.0f : lo, hi < 0 ? 0.0f : hi);
}

// Unordered or not equal: NaN is nonzero, and neither sign of zero is.
template <class T, int bit>
void set_nonzero(uint32_t& word, uint32_t packed) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  if ((packed & 0x7fffu) != 0) word |= 1u << bit;
  if ((packed & 0x7fff0000u) != 0) word |= 2u << bit;
}

// ----- WGMMA -----

struct Operand {
  uint64_t descriptor;
  bool transposed;
  bool operator==(const Operand& other) const { return descriptor == other.descriptor && transposed == other.transposed; }
};

void wgmma_fence();
void wgmma(float* acc, int n, Operand a, Operand b, bool accumulate, bool bf16);
void wgmma_commit();
void wgmma_wait(int groups);

template <int kGroups>
void wgmma_wait() {
  wgmma_wait(kGroups);
}

template <int kValues>
void wgmma_wait_all(float (&)[kValues]) {
  wgmma_wait(0);
}

template <int kAccs, int kValues>
void wgmma_wait_all(float (&)[kAccs][kValues]) {
  wgmma_wait(0);
}

template <class T, int N, bool trans_a, bool trans_b>
void wgmma(float (&acc)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  wgmma(acc, N, {desc_a, trans_a}, {desc_b, trans_b}, accumulate, std::is_same_v<T, BFloat16>);
}

}  // namespace mpk::sm90
