// Memory for large results on the CPU, which outlives them.
//
// The system zeroes fresh memory on its first touch. With a fresh result of 33 MB fuse_kv took 2.8 times as
// long as with a reused one, and 1.6 times as long with huge pages. So the memory of freed large results is
// kept, in huge pages, and reused for results of the same size. The pool never exceeds peak usage, and its
// free part never exceeds kKeptBytes.
#pragma once

#include <cstdint>

namespace fusedkv {

// Smaller results come from torch's allocator.
constexpr int64_t kLargeBytes = int64_t(16) << 20;
constexpr int64_t kKeptBytes = int64_t(512) << 20;

struct MemoryBlock {
  void* data;     // nullptr: out of memory, or not Linux
  int64_t bytes;  // a multiple of huge pages
};

// A block of at least `bytes`, aligned to huge pages, not initialized.
MemoryBlock take_memory(int64_t bytes);
void give_back_memory(const MemoryBlock& block);

// Bytes kept for reuse.
int64_t kept_memory_bytes();

// Returns them to the system.
void release_kept_memory();

}  // namespace fusedkv
