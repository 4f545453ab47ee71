// Scratch memory of the CPU kernels, kept between calls: a decode step allocates nothing once it has warmed
// up.
#pragma once

#include <cstdint>

namespace fusedkv {

// Per thread: for what one thread works on, and for what a call's threads hand to each other.
enum class Workspace { kTask, kCall };

// At least `bytes` of this thread, aligned to a cache line, until its next request of that kind. Throws
// std::bad_alloc.
void* cpu_workspace(Workspace kind, int64_t bytes);

// How often a workspace of any thread has had to grow.
int64_t workspace_allocations();

}  // namespace fusedkv
