// Checks of addresses and the life of asynchronous copies: see memory.h.

#include "simt/memory.h"

#include <cstdio>
#include <cstring>
#include <vector>

namespace fusedkv::simt {

namespace {

struct Buffer {
  uintptr_t start;
  size_t bytes;
  const char* name;
};

struct Copy {
  uint32_t to;
  const void* from;  // nullptr: zeros
  int64_t group;
};

// Of one thread; copies in the order of their groups.
struct Copies {
  std::vector<Copy> under_way;
  int64_t committed = 0;
};

std::vector<Buffer> buffers;
size_t last_hit = 0;
std::vector<uint4> shared_storage;  // aligned to 16 at least
size_t shared_size = 0;
std::vector<Copies> copies;
std::vector<bool> in_flight;  // pieces of 16 bytes that a copy will still write

bool contains(const Buffer& b, uintptr_t address, size_t bytes) {
  return address >= b.start && address - b.start <= b.bytes && bytes <= b.bytes - (address - b.start);
}

uintptr_t distance(const Buffer& b, uintptr_t address) {
  if (address < b.start) return b.start - address;
  return address - b.start < b.bytes ? 0 : address - b.start - b.bytes;
}

}  // namespace

void register_buffer(const void* start, size_t bytes, const char* name) {
  buffers.push_back({reinterpret_cast<uintptr_t>(start), bytes, name});
}

void forget_buffers() {
  buffers.clear();
}

void begin_block(int threads, size_t shared_bytes) {
  shared_size = shared_bytes;
  shared_storage.resize((shared_bytes + 15) / 16);
  if (shared_bytes) memset(shared_storage.data(), 0xff, shared_bytes);
  in_flight.assign(shared_storage.size(), false);
  copies.resize(size_t(threads));
  for (Copies& c : copies) {
    c.under_way.clear();
    c.committed = 0;
  }
}

unsigned char* shared_at(uint32_t address, uint32_t bytes, const char* what, Site site) {
  const uint32_t offset = address - kSharedBase;
  if (address >= kSharedBase && uint64_t(offset) + bytes <= shared_size && address % bytes == 0) {
    if (in_flight[offset / 16] && (!strcmp(what, "store") || !strcmp(what, "cp.async")))
      fail(site, std::string(what) + " to shared memory that an earlier cp.async may still write");
    return reinterpret_cast<unsigned char*>(shared_storage.data()) + offset;
  }
  char text[160];
  snprintf(text, sizeof text, "%s of %u bytes of shared memory at offset %lld (block has %zu)%s", what, bytes,
           (long long)address - (long long)kSharedBase, shared_size,
           address % bytes ? ": not aligned" : ": out of bounds");
  fail(site, text);
}

void check_global(const void* pointer, size_t bytes, const char* what, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool aligned = address % bytes == 0;
  if (aligned && last_hit < buffers.size() && contains(buffers[last_hit], address, bytes)) return;
  const Buffer* nearest = nullptr;
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (aligned && contains(buffers[i], address, bytes)) {
      last_hit = i;
      return;
    }
    if (!nearest || distance(buffers[i], address) < distance(*nearest, address)) nearest = &buffers[i];
  }
  char text[256];
  int length = snprintf(text, sizeof text, "%s of %zu bytes of global memory at %p: %s", what, bytes, pointer,
                        aligned ? "out of bounds" : "not aligned");
  if (nearest)
    snprintf(text + length, sizeof text - size_t(length), "; nearest is byte %lld of '%s' (%zu bytes)",
             (long long)(address - nearest->start), nearest->name, nearest->bytes);
  else
    snprintf(text + length, sizeof text - size_t(length), "; no buffer is registered");
  fail(site, text);
}

void copy_16(uint32_t to, const void* from, uint32_t bytes, Site site) {
  if (bytes != 0 && bytes != 16) fail(site, "cp.async reads 0 or 16 bytes here");
  unsigned char* const target = shared_at(to, 16, "cp.async", site);
  if (bytes) check_global(from, 16, "cp.async", site);
  memset(target, 0xff, 16);
  in_flight[(to - kSharedBase) / 16] = true;
  Copies& mine = copies[size_t(thread_index())];
  mine.under_way.push_back({to, bytes ? from : nullptr, mine.committed});
}

void commit_copies() {
  ++copies[size_t(thread_index())].committed;
}

void wait_for_copies(int pending) {
  Copies& mine = copies[size_t(thread_index())];
  size_t landed = 0;
  while (landed < mine.under_way.size() && mine.under_way[landed].group < mine.committed - pending) {
    const Copy& copy = mine.under_way[landed++];
    uint4& to = shared_storage[(copy.to - kSharedBase) / 16];
    if (copy.from)
      memcpy(&to, copy.from, 16);
    else
      memset(&to, 0, 16);
    in_flight[(copy.to - kSharedBase) / 16] = false;
  }
  mine.under_way.erase(mine.under_way.begin(), mine.under_way.begin() + std::ptrdiff_t(landed));
  yield();
}

}  // namespace fusedkv::simt
