// SPDX-License-Identifier: Apache-2.0
// Fibers that stand for the threads of a cluster of blocks, what they wait in, and what runs beside them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host {

constexpr unsigned kWarp = 32;
constexpr unsigned kWarpgroup = 128;

// Fibers that wait for the same thing. Whoever changes it wakes them all, and they look again.
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
  unsigned waiting = 0;  // at __syncthreads
  Queue queue;
  std::vector<Warp> warps;
  NamedBarrier named[16];
};

// Ends the launch with this message, the first one given. Does not return.
[[noreturn]] void fail(const std::string& message);

// For a fiber: until the queue is woken. `what` is for the report of a deadlock.
void wait_in(Queue& queue, const char* what);
void wake(Queue& queue);
void yield();

// Until all lanes of the warp are at the same instruction.
void sync_warp(const char* where);

Block& current_block();
std::vector<Block>& cluster();  // the blocks that run now
uint32_t random_number();

// ----- what runs beside the fibers, in sm90.cpp -----

void start_units();                   // for the cluster that begins
bool has_events();                    // that could happen now
void run_event(bool nobody_can_run);  // one of them, perhaps
void finish_units(const Block& of);   // all of its threads have ended

}  // namespace host
