// SPDX-License-Identifier: Apache-2.0
// Probes of the PTX wrappers of csrc/common/sm90.cuh: kernels that dump what one instruction did, bit by bit.
//
// Compiled by nvcc for a Hopper GPU, whose answers tests/device/probes.py records, and by the C++ compiler for the host
// emulator, which must give the same. Inputs are chosen so that every answer is exact.

#include <cuda_runtime.h>

#include <cstring>
#include <exception>
#include <string>

#include "common/clusters.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "linear_act/sm90/layout.h"

namespace mpk {
namespace {

constexpr int kThreads = 128;
constexpr int kImageBytes = 96 << 10;  // of shared memory that a probe fills or shows
constexpr uint32_t kUntouched = 0xabababab;

struct Probe {
  TensorMap map;
  int p[8];
  const uint32_t* in;
  uint32_t* out;
};

struct Shared {
  uint32_t image[kImageBytes / 4];
  sm90::Barrier barrier;
};

__device__ Shared& shared_memory() { return *reinterpret_cast<Shared*>(sm90::dynamic_shared()); }

// Fills the image from `in` (null: kUntouched), ready for TMA and WGMMA.
__device__ void fill(Shared& shared, const uint32_t* in) {
  for (int i = static_cast<int>(threadIdx.x); i < kImageBytes / 4; i += kThreads) {
    shared.image[i] = in == nullptr ? kUntouched : __ldg(in + i);
  }
  if (threadIdx.x == 0) {
    sm90::barrier_init(&shared.barrier, 1);
    sm90::fence_barrier_init();
  }
  sm90::fence_proxy_async();
  sm90::cluster_arrive();
  sm90::cluster_wait();
}

__device__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

__device__ void show(const Shared& shared, uint32_t* out, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += kThreads) __stcs(out + i, shared.image[i]);
}

// p: c0, c1, bytes of the box. Shows the box and the 128 bytes behind it, which must stay untouched.
__global__ void probe_load(MPK_GRID_CONSTANT(Probe) a) {
  Shared& shared = shared_memory();
  fill(shared, nullptr);
  if (threadIdx.x == 0) {
    sm90::tma_prefetch(&a.map);
    sm90::barrier_arrive_expect_tx(&shared.barrier, a.p[2]);
    sm90::tma_load(shared.image, &a.map, &shared.barrier, a.p[0], a.p[1]);
  }
  sm90::barrier_wait(&shared.barrier, 0);
  show(shared, a.out, a.p[2] + 128);
}

// p: c0, c1, bytes of the box, rows to the next. Each of two blocks loads a box for both and shows both.
__global__ void probe_multicast(MPK_GRID_CONSTANT(Probe) a) {
  Shared& shared = shared_memory();
  fill(shared, nullptr);
  const int rank = static_cast<int>(sm90::cluster_rank());
  if (threadIdx.x == 0) {
    sm90::barrier_arrive_expect_tx(&shared.barrier, 2 * a.p[2]);
    uint32_t* const box = shared.image + rank * a.p[2] / 4;
    sm90::tma_load_multicast(box, &a.map, &shared.barrier, a.p[0], a.p[1] + rank * a.p[3], 3);
  }
  sm90::barrier_wait(&shared.barrier, 0);
  sm90::cluster_arrive();
  sm90::cluster_wait();
  show(shared, a.out + rank * 2 * a.p[2] / 4, 2 * a.p[2]);
}

// p: c0, c1. The image is `in`; the tensor is `out`.
__global__ void probe_store(MPK_GRID_CONSTANT(Probe) a) {
  Shared& shared = shared_memory();
  fill(shared, a.in);
  if (threadIdx.x != 0) return;
  sm90::tma_store(&a.map, shared.image, a.p[0], a.p[1]);
  sm90::tma_store_commit();
  sm90::tma_store_wait_read<0>();
  sm90::tma_store_wait<0>();
}

// p: byte offsets of a and b in the image, leading and stride bytes of a, of b, accumulate. Shows the values of all threads.
template <class T, int N, bool kTransA, bool kTransB>
__global__ void probe_wgmma(MPK_GRID_CONSTANT(Probe) a) {
  Shared& shared = shared_memory();
  fill(shared, a.in);
  const uint32_t image = sm90::shared_address(shared.image);
  const uint64_t desc_a = descriptor(image + a.p[0], a.p[2], a.p[3]);
  const uint64_t desc_b = descriptor(image + a.p[1], a.p[4], a.p[5]);
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = static_cast<float>(1000 * static_cast<int>(threadIdx.x) + i);
  sm90::wgmma_fence();
  sm90::wgmma<T, N, kTransA, kTransB>(acc, desc_a, desc_b, a.p[6] != 0);
  sm90::wgmma_commit();
  sm90::wgmma_wait_all(acc);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) __stcs(a.out + threadIdx.x * (N / 2) + i, bits_of(acc[i]));
}

// A warp stores four matrices of its lane indices at swizzled addresses. Shows the image.
__global__ void probe_stmatrix(MPK_GRID_CONSTANT(Probe) a) {
  Shared& shared = shared_memory();
  fill(shared, nullptr);
  if (threadIdx.x < 32) {
    const uint32_t lane = threadIdx.x, word = lane | (lane + 0x100) << 16;
    uint8_t* const row = reinterpret_cast<uint8_t*>(shared.image) + swizzled(lane % 16, 2 + lane / 16);
    sm90::stmatrix_x4(row, word, word + 0x1000, word + 0x2000, word + 0x3000);
  }
  sm90::named_barrier_sync(1, kThreads);
  show(shared, a.out, 4096);
}

// For two values of `in` per thread: pack and pack_relu of both types, relu of each; and which halves of their bits are nonzero
// as fp16, as bf16.
__global__ void probe_round(MPK_GRID_CONSTANT(Probe) a) {
  float pair[2];
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = __ldg(a.in + threadIdx.x * 2 + i);
    memcpy(&pair[i], &bits, sizeof(bits));
  }
  uint32_t* const to = a.out + threadIdx.x * 8;
  __stcs(to + 0, sm90::pack<Half>(pair[0], pair[1]));
  __stcs(to + 1, sm90::pack<BFloat16>(pair[0], pair[1]));
  __stcs(to + 2, sm90::pack_relu<Half>(pair[0], pair[1]));
  __stcs(to + 3, sm90::pack_relu<BFloat16>(pair[0], pair[1]));
  __stcs(to + 4, bits_of(sm90::relu(pair[0])));
  __stcs(to + 5, bits_of(sm90::relu(pair[1])));
  uint32_t nonzero[2] = {};
  sm90::set_nonzero<Half, 3>(nonzero[0], bits_of(pair[0]));
  sm90::set_nonzero<BFloat16, 3>(nonzero[1], bits_of(pair[1]));
  __stcs(to + 6, nonzero[0]);
  __stcs(to + 7, nonzero[1]);
}

// A fresh mbarrier lets parity 1 pass; then two blocks arrive at each other's mbarrier and their own. Shows ranks, a shuffle,
// and floats stored to shared memory.
__global__ void probe_cluster(MPK_GRID_CONSTANT(Probe) a) {
  Shared& shared = shared_memory();
  const uint32_t rank = sm90::cluster_rank();
  if (threadIdx.x == 0) {
    sm90::barrier_init(&shared.barrier, 2);
    sm90::fence_barrier_init();
  }
  sm90::cluster_arrive_relaxed();
  sm90::cluster_wait();
  sm90::barrier_wait(&shared.barrier, 1);
  sm90::cluster_arrive();  // or the phase could complete before a thread has waited
  sm90::cluster_wait();
  if (threadIdx.x < 2) sm90::barrier_arrive_cluster(&shared.barrier, threadIdx.x);
  sm90::barrier_wait(&shared.barrier, 0);
  uint32_t* const to = a.out + (rank * kThreads + threadIdx.x) * 2;
  __stcs(to, rank << 16 | sm90::shuffle_xor(threadIdx.x, 5));
  sm90::store_shared(shared.image + 2 * threadIdx.x, static_cast<float>(threadIdx.x), -0.0f);
  sm90::named_barrier_sync(1, kThreads);
  __stcs(to + 1, shared.image[threadIdx.x]);
  sm90::cluster_arrive();
  sm90::cluster_wait();
}

using Kernel = void (*)(MPK_GRID_CONSTANT(Probe));

template <class T, int N>
Kernel wgmma_kernel(int trans_a, int trans_b) {
  if (trans_a) return trans_b ? probe_wgmma<T, N, true, true> : probe_wgmma<T, N, true, false>;
  return trans_b ? probe_wgmma<T, N, false, true> : probe_wgmma<T, N, false, false>;
}

// "wgmma", type (0 fp16, 1 bf16), N, trans_a, trans_b.
Kernel wgmma_kernel(const int64_t* p) {
  const int a = static_cast<int>(p[2]), b = static_cast<int>(p[3]);
  if (p[0] == 1) return wgmma_kernel<BFloat16, 128>(a, b);
  return p[1] == 64    ? wgmma_kernel<Half, 64>(a, b)
         : p[1] == 128 ? wgmma_kernel<Half, 128>(a, b)
         : p[1] == 192 ? wgmma_kernel<Half, 192>(a, b)
                       : wgmma_kernel<Half, 256>(a, b);
}

}  // namespace
}  // namespace mpk

// One probe on addresses of device memory. p[0..7] are the kernel's; p[8..12] the tensor of "load", "multicast" and
// "store" (fp32 or 16-bit, rows, columns, pitch) and the rows of its box, or the variant of "wgmma". Returns the error or an
// empty string.
extern "C" const char* mpk_probe(const char* name, const int64_t* p, const void* in, void* out) {
  using namespace mpk;
  static std::string message;
  message.clear();
  try {
    const std::string probe = name;
    Probe a{};
    for (int i = 0; i < 8; ++i) a.p[i] = static_cast<int>(p[i]);
    a.in = static_cast<const uint32_t*>(in);
    a.out = static_cast<uint32_t*>(out);
    if (probe == "load" || probe == "multicast" || probe == "store") {
      const auto dtype = p[8] ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::Half;
      a.map = encode_tensor_map(probe == "store" ? out : in, dtype, p[9], p[10], p[11], static_cast<int>(p[12]));
    }
    const unsigned cluster = probe == "multicast" || probe == "cluster" ? 2 : 1;
    const Kernel kernel = probe == "load"        ? probe_load
                          : probe == "multicast" ? probe_multicast
                          : probe == "store"     ? probe_store
                          : probe == "stmatrix"  ? probe_stmatrix
                          : probe == "round"     ? probe_round
                          : probe == "cluster"   ? probe_cluster
                                                 : wgmma_kernel(p + 8);
    allow_shared_bytes(kernel, sizeof(Shared));
    launch_clusters(kernel, cluster, cluster, kThreads, sizeof(Shared), nullptr, a);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
