#include "common/kept_memory.h"

#include <mutex>
#include <vector>

#include "common/huge_pages.h"

namespace fusedkv {

namespace {

#if defined(__linux__)

// Whole huge pages; nullptr: no memory.
void* map_block(int64_t bytes) {
  // One huge page more than needed, to trim the ends that are not aligned.
  const int64_t room = bytes + kHugePageBytes;
  void* mapped = mmap(nullptr, size_t(room), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* from = static_cast<char*>(mapped);
  const int64_t before = -reinterpret_cast<intptr_t>(from) & (kHugePageBytes - 1);
  if (before > 0) munmap(from, size_t(before));
  munmap(from + before + bytes, size_t(kHugePageBytes - before));
  advise_huge_pages(from + before, bytes);
  return from + before;
}

void unmap_block(const MemoryBlock& block) {
  munmap(block.data, size_t(block.bytes));
}

#else

void* map_block(int64_t) {
  return nullptr;
}
void unmap_block(const MemoryBlock&) {}

#endif

class Memory {
 public:
  MemoryBlock take(int64_t bytes) {
    bytes = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ += bytes;
    if (peak_ < used_) peak_ = used_;
    // The most recent first: it is the likeliest to be in a CPU cache.
    for (size_t i = kept_.size(); i-- > 0;) {
      if (kept_[i].bytes != bytes) continue;
      const MemoryBlock found = kept_[i];
      kept_.erase(kept_.begin() + int64_t(i));
      kept_bytes_ -= bytes;
      return found;
    }
    drop_to(peak_ - used_);
    const MemoryBlock fresh{map_block(bytes), bytes};
    if (fresh.data == nullptr) used_ -= bytes;
    return fresh;
  }

  void give_back(const MemoryBlock& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.bytes;
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    drop_to(kKeptBytes);
  }

  int64_t kept_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_bytes_;
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_to(0);
    peak_ = used_;
  }

 private:
  // Unmaps the oldest blocks until at most `bytes` are kept.
  void drop_to(int64_t bytes) {
    while (kept_bytes_ > bytes) {
      unmap_block(kept_.front());
      kept_bytes_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<MemoryBlock> kept_;  // oldest first
  int64_t kept_bytes_ = 0, used_ = 0, peak_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Memory& memory() {
  static Memory& instance = *new Memory;
  return instance;
}

}  // namespace

MemoryBlock take_memory(int64_t bytes) {
  return memory().take(bytes);
}

void give_back_memory(const MemoryBlock& block) {
  memory().give_back(block);
}

int64_t kept_memory_bytes() {
  return memory().kept_bytes();
}

void release_kept_memory() {
  memory().release();
}

}  // namespace fusedkv
