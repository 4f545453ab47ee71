// The scheduler, barriers and their errors (executor.h). Later blocks and launches reuse the fibers
// (fiber.h). After a failed launch, unfinished fibers restart at the next one; kernels own nothing that needs
// a destructor.

#include "simt/executor.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fusedkv::simt {

namespace {

constexpr int kMaxThreads = 1024;

struct Thread : Fiber {
  bool exited = false;
  int index = 0;
  uint3 position{};
  const char* waits_at = "";
  Site site{};
};

// Lanes of a warp that wait for each other.
struct Meeting {
  const char* name;
  WarpFunction compute;
  Site site;
  uint32_t mask, arrived;
  void* lanes[kWarpSize];
};

struct Warp {
  uint32_t present = 0, exited = 0, runnable = 0;
  std::vector<Meeting> meetings;
};

std::vector<std::unique_ptr<Thread>> pool;
std::vector<Warp> warps;
Thread host;  // the caller of run()
Thread* current = &host;
const std::function<void()>* kernel_thread = nullptr;
std::string error;
int threads = 0, live = 0, at_barrier = 0;
Site barrier_site{};
uint32_t runnable_warps = 0;
uint64_t random_state = 0;
unsigned favorite = 0;
uint64_t patience = 0;

uint64_t next_random() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

unsigned some_bit(uint32_t bits, unsigned rotation) {
  const uint32_t rotated = rotation ? bits >> rotation | bits << (32 - rotation) : bits;
  return (unsigned(__builtin_ctz(rotated)) + rotation) % 32;
}

void set_runnable(int warp, uint32_t lanes) {
  warps[warp].runnable |= lanes;
  if (warps[warp].runnable) runnable_warps |= 1u << warp;
}

// Some lane of the favorite warp, while it is runnable: a warp far ahead of the others exposes a missing
// barrier between warps. The number of steps until the favorite changes differs from block to block.
Thread* choose() {
  if (!runnable_warps || !error.empty()) return &host;
  const uint64_t random = next_random();
  if ((random >> 32 & patience) == 0) favorite = unsigned(random >> 16) % warps.size();
  const unsigned w =
      runnable_warps >> favorite & 1 ? favorite : some_bit(runnable_warps, unsigned(random >> 8) % 32);
  Warp& warp = warps[w];
  const unsigned lane = some_bit(warp.runnable, unsigned(random) % 32);
  warp.runnable &= ~(1u << lane);
  if (!warp.runnable) runnable_warps &= ~(1u << w);
  return pool[w * kWarpSize + lane].get();
}

void thread_main();

void switch_to(Thread* next) {
  Thread* const self = current;
  if (next == self) return;
  current = next;
  threadIdx = next->position;
  switch_fiber(*self, *next, thread_main);
}

void thread_main() {
  for (;;) {
    try {
      (*kernel_thread)();
    } catch (const std::exception& e) {
      error = e.what();
    }
    Thread& self = *current;
    self.exited = true;
    --live;
    warps[self.index / kWarpSize].exited |= 1u << self.index % kWarpSize;
    switch_to(choose());
  }
}

std::string text(const char* format, unsigned a = 0, unsigned b = 0, unsigned c = 0) {
  char buffer[128];
  snprintf(buffer, sizeof buffer, format, a, b, c);
  return buffer;
}

std::string text(Site site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + text(":%u", unsigned(site.line));
}

std::string text_of_block() {
  return text("block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// Where threads wait if none can continue.
std::string deadlock() {
  struct Group {
    std::string where;
    int first, count;
  };
  std::vector<Group> groups;
  for (int i = 0; i < threads; ++i) {
    const Thread& f = *pool[i];
    const std::string where =
        f.exited ? std::string("exited") : std::string("wait at ") + f.waits_at + " (" + text(f.site) + ")";
    const auto found =
        std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.where == where; });
    if (found != groups.end())
      ++found->count;
    else
      groups.push_back({where, i, 1});
  }
  std::string what = "deadlock in " + text_of_block();
  for (const Group& g : groups)
    what += "; " + g.where +
            text(": %u of %u threads, first %u", unsigned(g.count), unsigned(threads), unsigned(g.first));
  for (size_t w = 0; w < warps.size(); ++w)
    for (const Meeting& m : warps[w].meetings)
      what += text("; lanes 0x%08x of warp %u have not come", m.mask & ~m.arrived, unsigned(w));
  return what;
}

void run_block(size_t shared_bytes) {
  live = threads;
  at_barrier = 0;
  runnable_warps = 0;
  error.clear();
  begin_block(threads, shared_bytes);
  warps.assign(size_t(threads + kWarpSize - 1) / kWarpSize, Warp{});
  for (int i = 0; i < threads; ++i) {
    Thread& f = *pool[i];
    f.exited = false;
    f.position = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y,
                  unsigned(i) / (blockDim.x * blockDim.y)};
    warps[i / kWarpSize].present |= 1u << i % kWarpSize;
    set_runnable(i / kWarpSize, 1u << i % kWarpSize);
  }
  favorite = unsigned(next_random() % warps.size());
  patience = (uint64_t(1) << next_random() % 16) - 1;
  switch_to(choose());
  if (live && error.empty()) error = deadlock();
  if (error.empty()) return;
  for (int i = 0; i < threads; ++i) pool[i]->started = pool[i]->started && pool[i]->exited;
  throw std::runtime_error(error);
}

}  // namespace

Settings& settings() {
  static Settings all;
  return all;
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const uint64_t in_block = uint64_t(block.x) * block.y * block.z;
  if (!in_block || in_block > kMaxThreads || block.z > 64)
    throw std::runtime_error(text("launch: a block of (%u, %u, %u) threads", block.x, block.y, block.z));
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(text("launch: a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z));
  if (shared_bytes > size_t(settings().shared_per_block))
    throw std::runtime_error(text("launch: %u bytes of shared memory of %u", unsigned(shared_bytes),
                                  unsigned(settings().shared_per_block)));
  threads = int(in_block);
  blockDim = block;
  gridDim = grid;
  kernel_thread = &thread;
  host.started = true;
  random_state = settings().seed;
  while (pool.size() < in_block) {
    pool.push_back(std::make_unique<Thread>());
    pool.back()->index = int(pool.size()) - 1;
  }
  std::vector<uint64_t> order(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
    std::swap(order[i], order[next_random() % (i + 1)]);
  }
  for (uint64_t i : order) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(shared_bytes);
  }
}

void fail(Site site, const std::string& what) {
  throw std::runtime_error(text_of_block() +
                           text(", thread (%u, %u, %u), ", threadIdx.x, threadIdx.y, threadIdx.z) +
                           text(site) + ": " + what);
}

int thread_index() {
  return current->index;
}

void yield() {
  set_runnable(current->index / kWarpSize, 1u << current->index % kWarpSize);
  switch_to(choose());
}

void block_barrier(Site site) {
  if (at_barrier && !same(site, barrier_site))
    fail(site, "divergent __syncthreads: other threads of the block wait at " + text(barrier_site));
  barrier_site = site;
  current->waits_at = "__syncthreads";
  current->site = site;
  if (++at_barrier == threads) {
    at_barrier = 0;
    for (size_t w = 0; w < warps.size(); ++w) set_runnable(int(w), warps[w].present);
  }
  switch_to(choose());
}

void warp_collective(const char* name, WarpFunction compute, uint32_t mask, void* lane_data, Site site) {
  const int w = current->index / kWarpSize, lane = current->index % kWarpSize;
  Warp& warp = warps[w];
  if (!(mask >> lane & 1))
    fail(site, name + text(" with mask 0x%08x, which does not name lane %u itself", mask, lane));
  if (const uint32_t gone = mask & ~(warp.present & ~warp.exited))
    fail(site, name + text(" with mask 0x%08x, but lanes 0x%08x have exited or do not exist", mask, gone));
  auto m = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const Meeting& x) {
    return x.compute == compute && x.mask == mask &&
           (!compute || (same(x.site, site) && !strcmp(x.name, name)));
  });
  if (m == warp.meetings.end()) m = warp.meetings.insert(m, {name, compute, site, mask, 0, {}});
  m->lanes[lane] = lane_data;
  m->arrived |= 1u << lane;
  current->waits_at = name;
  current->site = site;
  if (m->arrived == mask) {
    if (compute) compute(m->lanes, mask);
    warp.meetings.erase(m);
    set_runnable(w, mask);
  }
  switch_to(choose());
}

}  // namespace fusedkv::simt
