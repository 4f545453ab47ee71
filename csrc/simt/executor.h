// Runs a CUDA kernel on the host: every thread a fiber, blocks one after another.
//
// Checks: a thread runs up to its next synchronization point (__syncthreads, warp collective, wait for
// cp.async). There a seeded random choice selects the next thread. Code that relies on an order without a
// barrier gives a wrong result under some seed. A deadlock, at different barriers or with threads that have
// exited, is an error with the places where threads wait.
//
// Does not detect: races between blocks, memory ordering, the interleaving of single instructions, timing and
// registers. Blocks never overlap, so that a kernel whose blocks wait for each other hangs. There is one
// launch at a time; the caller excludes other host threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "simt/vector_types.h"

// Of the thread that runs; the executor sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fusedkv::simt {

constexpr int kWarpSize = 32;

// A place in a kernel, for errors. As the default argument of a function: where that function was called.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Settings {
  uint64_t seed = 1;
  int sm_count = 3;               // few, so that small tests give a block several chunks
  int shared_per_block = 232448;  // bytes: 227 KiB as on sm_90
};

Settings& settings();

// Runs `thread` once per thread of the grid. Throws std::runtime_error for the first thing that is wrong.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Ends the launch with an error about the running thread.
[[noreturn]] void fail(Site site, const std::string& what);

// Index of the running thread in its block.
int thread_index();

// __syncthreads.
void block_barrier(Site site);

// The scheduler may switch to another thread.
void yield();

// Called after all lanes of `mask` have arrived. lanes[i] is the data of lane i and receives its result.
using WarpFunction = void (*)(void* const* lanes, uint32_t mask);

// Waits until all lanes of `mask` are at this place of the kernel with the same function, or, without a
// function, at any place. `lane_data` lives on the caller's stack.
void warp_collective(const char* name, WarpFunction compute, uint32_t mask, void* lane_data, Site site);

}  // namespace fusedkv::simt
