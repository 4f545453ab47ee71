#include "cpu/workspace.h"

#include <atomic>
#include <memory>
#include <new>

namespace fusedkv {

namespace {

constexpr int64_t kLine = 64;

struct Buffer {
  std::unique_ptr<char[]> memory;
  int64_t bytes = 0;
};

thread_local Buffer buffers[2];
std::atomic<int64_t> allocations{0};

}  // namespace

void* cpu_workspace(Workspace kind, int64_t bytes) {
  Buffer& buffer = buffers[int(kind)];
  if (buffer.bytes < bytes + kLine) {
    buffer.memory.reset();  // first: both are never needed
    buffer.bytes = 0;
    // Half more than requested: a sequence that grows token by token rarely reallocates.
    const int64_t size = bytes + bytes / 2 + kLine;
    buffer.memory.reset(new char[size_t(size)]);
    buffer.bytes = size;
    allocations.fetch_add(1, std::memory_order_relaxed);
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.memory.get());
  return reinterpret_cast<void*>((address + kLine - 1) / kLine * kLine);
}

int64_t workspace_allocations() {
  return allocations.load(std::memory_order_relaxed);
}

}  // namespace fusedkv
