// SPDX-License-Identifier: Apache-2.0
// PTX wrappers for sm_90a, one or two instructions each: mbarriers, TMA, WGMMA, stmatrix, clusters. The only file with PTX.
//
// A kernel that uses only these, <cuda_runtime.h> and plain C++ also runs on the host emulator, whose tests/emulator/common/
// sm90.cuh is found in place of this file and is written from the PTX ISA, not from here. Shared memory is passed as ordinary
// pointers. Source: PTX ISA 8.0 and later; each instruction's section has its name.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cast.h"
#include "tensor_map.h"

namespace mpk::sm90 {

// ----- shared memory -----

// The block's dynamic shared memory, at a multiple of 1024 bytes, the period of the 128-byte swizzle.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t mpk_dynamic_shared[];
  return mpk_dynamic_shared;
}

// The address in the .shared window, which instructions and descriptors take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Two floats, at a multiple of 8 bytes.
__device__ __forceinline__ void store_shared(void* shared, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(shared)), "f"(first), "f"(second) : "memory");
}

// 16 bytes, at a multiple of 16, as four words.
__device__ __forceinline__ void load_shared(const void* shared, uint32_t (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(shared))
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, by a whole warp. Lane l passes the address of row l % 8 of matrix l / 8, 16 bytes at
// a multiple of 16; its value i holds the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i.
__device__ __forceinline__ void stmatrix_x4(void* shared, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// Makes this thread's ordinary stores to shared memory visible to TMA and WGMMA that start after a later barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ----- barriers -----

// bar.sync: waits until `threads` threads, whole warps, have reached barrier `id` (1 to 15; 0 is that of __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of all blocks of the cluster arrive, then wait; a block outside of a cluster is a cluster of one. Writes before
// an arrival are visible after the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// The same, but only writes that a fence has released are visible: fence_barrier_init is enough for mbarriers.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The rank of this block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// An mbarrier in shared memory: a phase completes when none of its arrivals and bytes is pending. NOTE: arrivals and waits
// order ordinary loads and stores of this block only. Data that crosses blocks here is copied by TMA and read by WGMMA, which
// the bytes and the arrivals order; cluster scope would cost a fence of the whole GPU at every arrival, and an invalidation of
// the L1 cache after every wait.
using Barrier = uint64_t;

// By one thread, before any other touches it; every phase then expects this many arrivals.
__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// By the thread that initialized: makes the mbarriers visible to the cluster and to TMA after the next cluster barrier.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Adds `bytes` to what the phase waits for, then arrives. NOTE: bytes may arrive before they are expected.
__device__ __forceinline__ void barrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Arrives at the mbarrier of the same offset in block `rank` of the cluster, which may be this block.
__device__ __forceinline__ void barrier_arrive_cluster(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has completed; the first phase has parity 0. NOTE: on a fresh mbarrier a wait for parity
// 1 returns at once.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// ----- TMA -----

// Each copies a box of the tensor that `map` describes, whose first element has column c0 (of the contiguous dimension) and row
// c1. Elements outside of the tensor are loaded as 0, count as bytes, and are not stored. `shared` is at a multiple of 1024
// bytes; `map` is a kernel's __grid_constant__ parameter or part of one. By one thread.

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Completes as bytes at `barrier`.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, Barrier* barrier, int32_t c0, int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

// To the same offset, and the mbarrier of the same offset, in each block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap* map, Barrier* barrier, int32_t c0, int32_t c1,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

// Joins the thread's open bulk group; the same thread commits and waits.
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* shared, int32_t c0, int32_t c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most the N latest groups still read shared memory.
template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Waits until at most the N latest groups have not completed their writes.
template <int N>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ----- warps and registers -----

// The value of the lane whose index differs in the bits of `lanes`. All lanes take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(~0u, value, lanes);
}

// The value of lane `lane`. All lanes take part.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(~0u, value, lane);
}

// What the lanes of the warp stored to shared memory before is visible to all of them.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Registers per thread of the calling warpgroup, a multiple of 8.
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// max(x, 0); NaN propagates.
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// Both rounded to T, to nearest even; `lo` in the low 16 bits.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));  // round: fp32 -> fp16
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));  // round: fp32 -> bf16
  }
  return packed;
}

// The same of max(x, 0); NaN propagates. NOTE: the sign of a zero result is unspecified.
template <class T>
__device__ __forceinline__ uint32_t pack_relu(float lo, float hi) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));  // round: fp32 -> fp16
  } else {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));  // round: fp32 -> bf16
  }
  return packed;
}

// `word` with bits `bit` and `bit + 1` set where the low and the high of two packed values of type T are nonzero, NaN included.
template <class T, int bit>
__device__ __forceinline__ void set_nonzero(uint32_t& word, uint32_t packed) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("{\n.reg .pred lo, hi;\nsetp.neu.f16x2 lo|hi, %1, %2;\n@lo or.b32 %0, %0, %3;\n@hi or.b32 %0, %0, %4;\n}"
        : "+r"(word)
        : "r"(packed), "r"(0), "n"(1u << bit), "n"(2u << bit));
  } else {
    asm("{\n.reg .pred lo, hi;\nsetp.neu.bf16x2 lo|hi, %1, %2;\n@lo or.b32 %0, %0, %3;\n@hi or.b32 %0, %0, %4;\n}"
        : "+r"(word)
        : "r"(packed), "r"(0), "n"(1u << bit), "n"(2u << bit));
  }
}

// ----- WGMMA -----

// By all 128 threads of a warpgroup: before the first wgmma, and before one whose accumulator registers were accessed since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the `kGroups` latest groups are in flight. The shared memory that the others read may be reused; their
// accumulators may not be read yet.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Waits for all groups; then `acc` may be read. As an operand of the asm statements, no read of it is moved before them.
template <int kValues>
__device__ __forceinline__ void wgmma_wait_all(float (&acc)[kValues]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// The same of several.
template <int kAccs, int kValues>
__device__ __forceinline__ void wgmma_wait_all(float (&accs)[kAccs][kValues]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kAccs * kValues; ++i) asm volatile("" : "+f"(accs[i / kValues][i % kValues])::"memory");
}

// clang-format off
#define MPK_ACC8(i) \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), \
  "+f"(acc[i + 4]), "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define MPK_ACC32(i) MPK_ACC8(i), MPK_ACC8(i + 8), MPK_ACC8(i + 16), MPK_ACC8(i + 24)
#define MPK_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MPK_REGISTERS_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MPK_REGISTERS_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MPK_REGISTERS_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands after the accumulator's registers, by their numbers: desc_a, desc_b, accumulate, trans_a, trans_b.
#define MPK_WGMMA(n, type, registers, a, b, add, ta, tb, ...) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
               " {" registers "}, " \
               "%" a ", %" b ", p, 1, 1, %" ta ", %" tb ";\n}" \
               : __VA_ARGS__ \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<uint32_t>(accumulate)), "n"(trans_a), "n"(trans_b))
#define MPK_WGMMA_N64(type) MPK_WGMMA("64", type, MPK_REGISTERS_0, "32", "33", "34", "35", "36", MPK_ACC32(0))
#define MPK_WGMMA_N128(type) \
  MPK_WGMMA("128", type, MPK_REGISTERS_0 ", " MPK_REGISTERS_32, "64", "65", "66", "67", "68", MPK_ACC32(0), MPK_ACC32(32))
#define MPK_WGMMA_N192(type) \
  MPK_WGMMA("192", type, MPK_REGISTERS_0 ", " MPK_REGISTERS_32 ", " MPK_REGISTERS_64, \
            "96", "97", "98", "99", "100", MPK_ACC32(0), MPK_ACC32(32), MPK_ACC32(64))
#define MPK_WGMMA_N256(type) \
  MPK_WGMMA("256", type, MPK_REGISTERS_0 ", " MPK_REGISTERS_32 ", " MPK_REGISTERS_64 ", " MPK_REGISTERS_96, \
            "128", "129", "130", "131", "132", MPK_ACC32(0), MPK_ACC32(32), MPK_ACC32(64), MPK_ACC32(96))
// clang-format on

// acc (64 x N) = a (64 x 16) b (16 x N) [+ acc], by the 128 threads of a warpgroup; asynchronous until a wait. The operands lie
// in shared memory as their descriptors say; trans: contiguous along M (of a) or N (of b), not along K. Value 4 j + 2 h + i of
// thread t is the element (t / 32 * 16 + 8 h + t % 32 / 4, 8 j + 2 (t % 4) + i).
template <class T, int N, bool trans_a, bool trans_b>
__device__ __forceinline__ void wgmma(float (&acc)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  if constexpr (std::is_same_v<T, Half>) {
    if constexpr (N == 64) MPK_WGMMA_N64("f16");
    if constexpr (N == 128) MPK_WGMMA_N128("f16");
    if constexpr (N == 192) MPK_WGMMA_N192("f16");
    if constexpr (N == 256) MPK_WGMMA_N256("f16");
  } else {
    if constexpr (N == 64) MPK_WGMMA_N64("bf16");
    if constexpr (N == 128) MPK_WGMMA_N128("bf16");
    if constexpr (N == 192) MPK_WGMMA_N192("bf16");
    if constexpr (N == 256) MPK_WGMMA_N256("bf16");
  }
}

#undef MPK_WGMMA_N256
#undef MPK_WGMMA_N192
#undef MPK_WGMMA_N128
#undef MPK_WGMMA_N64
#undef MPK_WGMMA
#undef MPK_REGISTERS_96
#undef MPK_REGISTERS_64
#undef MPK_REGISTERS_32
#undef MPK_REGISTERS_0
#undef MPK_ACC32
#undef MPK_ACC8

}  // namespace mpk::sm90
