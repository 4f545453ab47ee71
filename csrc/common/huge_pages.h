// Huge pages for large memory (Linux; elsewhere nothing happens).
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedkv {

constexpr int64_t kHugePageBytes = int64_t(2) << 20;

// Requests huge pages for the whole huge pages within [data, data + bytes). Comes before the first write:
// there is then one page fault per 2 MiB, not per 4 KiB. This is only advice. False if nothing was requested
// or the system refused; the memory then has small pages.
inline bool advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t mask = uintptr_t(kHugePageBytes) - 1;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + mask) & ~mask;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~mask;
  return bytes >= kHugePageBytes && first < end &&
         madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace fusedkv
