// The memory that kernels may touch: a block's shared memory, the global buffers of an op, and cp.async
// between them.
//
// Checks: every access lies in the block's shared memory or in one registered buffer, naturally aligned.
// Shared memory is all NaN (0xff) when a block starts. The 16 bytes that cp.async writes are NaN at once and
// get their data when the issuing thread waits for that copy's group. So both a read that is too early and a
// copy over a stage in use give NaN. Stores and copies to bytes of a pending copy are errors.
//
// Does not detect: an access inside the wrong part of the right buffer, bank conflicts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/executor.h"

namespace fusedkv::simt {

// Where shared memory starts; not 0, so that address 0 is out of bounds. A multiple of all alignments.
constexpr uint32_t kSharedBase = 1024;

// Global memory that kernels may touch until forget_buffers(). `name` (a literal) appears in errors.
void register_buffer(const void* start, size_t bytes, const char* name);
void forget_buffers();

// The executor's part: fresh shared memory, no copies under way.
void begin_block(int threads, size_t shared_bytes);

// Host address of shared memory; `what` names the access.
unsigned char* shared_at(uint32_t address, uint32_t bytes, const char* what, Site site);

void check_global(const void* address, size_t bytes, const char* what, Site site);

// cp.async of the running thread.
void copy_16(uint32_t to, const void* from, uint32_t bytes, Site site);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace fusedkv::simt
