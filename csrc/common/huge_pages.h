// Huge pages for large memory (Linux; elsewhere nothing happens).
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedkv {

constexpr int64_t kHugePageBytes = int64_t(2) << 20;

// Asks for huge pages in the part of [data, data + bytes) that whole huge pages fit into. To be called before
// the memory is first written: a page then costs one fault per 2 MiB, not one per 4 KiB. Only advice: false
// if nothing was asked for or the kernel has refused, and all goes on with small pages.
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
