// SPDX-License-Identifier: Apache-2.0
// Host emulator: the fibers that emulate the threads of a cluster, the queues they wait in, and the asynchronous units.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host {

constexpr unsigned kWarp = 32;
constexpr unsigned kWarpgroup = 128;

// Fibers that wait for the same condition. A change of it wakes them all, and each checks again.
struct Queue {
  std::vector<unsigned> fibers;
};

struct Warp {
  unsigned live = 0, waiting = 0;
  uint32_t priority = 0;
  const char* where = nullptr;
  Queue queue;
};

struct NamedBarrier {
  unsigned expected = 0;
  std::vector<unsigned> arrived;  // threads
  Queue queue;
};

struct Block {
  unsigned index, rank;           // in the grid, in the cluster
  unsigned first, threads, live;  // fibers
  uint8_t* shared;                // dynamic
  size_t shared_bytes;
  unsigned waiting = 0;               // at __syncthreads
  bool any = false, was_any = false;  // of their values: so far, and at the last barrier
  Queue queue;
  std::vector<Warp> warps;
  NamedBarrier named[16];
};

// Ends the launch with the first message given. Does not return.
[[noreturn]] void fail(const std::string& message);

// Blocks the current fiber until the queue is woken. `what` is for the deadlock report.
void wait_in(Queue& queue, const char* what);
void wake(Queue& queue);
void yield();

// Blocks until all lanes of the warp have reached the same instruction.
void sync_warp(const char* where);

// What PTX calls bar.sync, barrier.cluster.arrive and .wait.
void sync_named(int id, int threads);
void arrive_cluster();
void wait_cluster();

Block& current_block();
std::vector<Block>& cluster();  // the running blocks
uint32_t random_number();

// ----- the asynchronous units (TMA, WGMMA), in sm90.cpp -----

void start_units();                  // for a new cluster
bool has_events();                   // whether an operation is pending
void run_event(bool all_blocked);    // completes one, unless all are to be late
void finish_units(const Block& of);  // after the block's last thread

}  // namespace host
