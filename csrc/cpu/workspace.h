// Scratch memory of the CPU kernels, kept between calls: a decode step allocates nothing after warm-up.
#pragma once

#include <cstdint>

namespace fusedkv {

// Per thread. kTask: scratch of one thread. kCall: what the threads of a call exchange.
enum class Workspace { kTask, kCall };

// At least `bytes`, aligned to a cache line, valid until the thread's next request of that kind. Throws
// std::bad_alloc.
void* cpu_workspace(Workspace kind, int64_t bytes);

// How often the workspaces of all threads have grown.
int64_t workspace_allocations();

}  // namespace fusedkv
