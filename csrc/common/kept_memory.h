// Memory for large results on the CPU, which outlives them.
//
// The system zeroes fresh memory on its first touch. With a fresh result of 33 MB fuse_kv took 2.8 times as
// long as with one that was there before, and 1.6 times as long in huge pages. So the memory of large results
// is kept, in huge pages, when they are freed, and the next ones of that size are made of it. Used and kept
// together it is never more than was in use at once, and what is kept never more than kKeptBytes.
#pragma once

#include <cstdint>

namespace fusedkv {

// Results below this size are left to torch's allocator.
constexpr int64_t kLargeBytes = int64_t(16) << 20;
constexpr int64_t kKeptBytes = int64_t(512) << 20;

struct MemoryBlock {
  void* data;     // nullptr: the system has no such memory
  int64_t bytes;  // a multiple of huge pages
};

// A block of at least `bytes`, aligned to huge pages, with whatever the last user left in it.
MemoryBlock take_memory(int64_t bytes);
void give_back_memory(const MemoryBlock& block);

// Bytes kept for the next results.
int64_t kept_memory_bytes();

// Gives them back to the system.
void release_kept_memory();

}  // namespace fusedkv
