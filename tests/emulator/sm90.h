// SPDX-License-Identifier: Apache-2.0
// Host emulator: the PTX wrappers of csrc/common/sm90.cuh without their templates, for tests/emulator/common/sm90.cuh;
// implemented in sm90.cpp.

#pragma once

#include <cstdint>

namespace host {

// fibers.cpp
void sync_named(int id, int threads);
void arrive_cluster();
void wait_cluster();

uint8_t* dynamic_shared();
uint32_t shared_address(const void* shared);
unsigned cluster_rank();

void stmatrix_x4(void* row, const uint32_t (&matrices)[4]);
void load_shared(const void* shared, uint32_t (&words)[4]);
void store_shared(void* shared, const void* value, uint32_t bytes);
void fence_proxy_async();

void arrive_cluster_relaxed();
void barrier_init(void* barrier, uint32_t arrivals);
void fence_barrier_init();
void barrier_arrive(void* barrier);
void barrier_arrive_expect_tx(void* barrier, uint32_t bytes);
void barrier_arrive_cluster(void* barrier, uint32_t rank);
void barrier_wait(void* barrier, uint32_t parity);

void tma_prefetch(const void* map);
void tma_load(void* shared, const void* map, void* barrier, int32_t c0, int32_t c1, uint32_t blocks);
void tma_store(const void* map, const void* shared, int32_t c0, int32_t c1);
void tma_store_commit();
void tma_store_wait(int groups, bool only_read);

struct Operand {
  uint64_t descriptor;
  bool transposed;
  bool operator==(const Operand& other) const { return descriptor == other.descriptor && transposed == other.transposed; }
};

void wgmma_fence();
void wgmma(float* acc, int n, Operand a, Operand b, bool accumulate, bool bf16);
void wgmma_commit();
void wgmma_wait(int groups);

}  // namespace host
