// CUDA's names on the host, as far as the kernels use them, and those of cuda/gpu.cuh.
//
// Checks: loads, stores and atomics stay in the registered buffers (memory.h). All lanes of a mask arrive,
// and no lane reads a lane outside the mask (executor.h).
//
// Does not detect: what executor.h and memory.h do not, and accesses to global memory without load() and
// store().
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/executor.h"
#include "simt/memory.h"
#include "simt/ptx.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// ---- synchronization
// -----------------------------------------------------------------------------------------

inline void __syncthreads(fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  fusedkv::simt::block_barrier(site);
}

inline void __syncwarp(uint32_t mask = fusedkv::simt::kAllLanes,
                       fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  fusedkv::simt::warp_collective("__syncwarp", nullptr, mask, nullptr, site);
}

inline void __threadfence() {}

// ---- warp collectives
// ----------------------------------------------------------------------------------------

namespace fusedkv::simt {

struct ShuffleLane {
  uint64_t bits;
  int from;
  uint64_t result;
  Site site;
};

inline void shuffle(void* const* lanes, uint32_t mask) {
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    auto& lane = *static_cast<ShuffleLane*>(lanes[i]);
    if (!(mask >> lane.from & 1))
      fail(lane.site, "lane " + std::to_string(i) + " reads lane " + std::to_string(lane.from) +
                          ", which is not in the shuffle's mask");
    lane.result = static_cast<const ShuffleLane*>(lanes[lane.from])->bits;
  }
}

template <typename T>
inline T shuffled(const char* name, uint32_t mask, T x, int from, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  ShuffleLane lane{0, from, 0, site};
  memcpy(&lane.bits, &x, sizeof x);
  warp_collective(name, shuffle, mask, &lane, site);
  memcpy(&x, &lane.result, sizeof x);
  return x;
}

// The lane to read from, or this lane if that is outside the segment of `width` lanes.
inline int segment_lane(int delta, int width) {
  const int own = thread_index() % kWarpSize, from = own + delta;
  return from >= 0 && from / width == own / width ? from : own;
}

inline void gather_votes(void* const* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (int i = 0; i < kWarpSize; ++i)
    if (mask >> i & 1) votes |= (*static_cast<uint32_t*>(lanes[i]) ? 1u : 0u) << i;
  for (int i = 0; i < kWarpSize; ++i)
    if (mask >> i & 1) *static_cast<uint32_t*>(lanes[i]) = votes;
}

inline uint32_t votes(const char* name, uint32_t mask, int vote, Site site) {
  uint32_t x = vote != 0;
  warp_collective(name, gather_votes, mask, &x, site);
  return x;
}

}  // namespace fusedkv::simt

template <typename T>
inline T __shfl_sync(uint32_t mask, T x, int from, int width = 32,
                     fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  const int segment = fusedkv::simt::thread_index() % 32 / width * width;
  return fusedkv::simt::shuffled("__shfl_sync", mask, x, segment + (from & (width - 1)), site);
}

template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T x, int lanes, int width = 32,
                         fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  const int own = fusedkv::simt::thread_index() % 32, from = (own ^ lanes) & 31;
  // As the hardware does it: lanes of later segments are not reached.
  return fusedkv::simt::shuffled("__shfl_xor_sync", mask, x, from / width <= own / width ? from : own, site);
}

template <typename T>
inline T __shfl_down_sync(uint32_t mask, T x, unsigned delta, int width = 32,
                          fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  const int from = fusedkv::simt::segment_lane(int(delta & 31), width);
  return fusedkv::simt::shuffled("__shfl_down_sync", mask, x, from, site);
}

template <typename T>
inline T __shfl_up_sync(uint32_t mask, T x, unsigned delta, int width = 32,
                        fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  const int from = fusedkv::simt::segment_lane(-int(delta & 31), width);
  return fusedkv::simt::shuffled("__shfl_up_sync", mask, x, from, site);
}

inline unsigned __ballot_sync(uint32_t mask, int vote,
                              fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  return fusedkv::simt::votes("__ballot_sync", mask, vote, site);
}

inline int __any_sync(uint32_t mask, int vote, fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  return fusedkv::simt::votes("__any_sync", mask, vote, site) != 0;
}

inline int __all_sync(uint32_t mask, int vote, fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  return fusedkv::simt::votes("__all_sync", mask, vote, site) == mask;
}

// ---- numbers
// -------------------------------------------------------------------------------------------------

inline float __fmul_rn(float x, float y) {
  return x * y;
}

inline float __fadd_rn(float x, float y) {
  return x + y;
}

inline float __uint_as_float(unsigned x) {
  return fusedkv::simt::bit_cast<float>(x);
}

inline unsigned __float_as_uint(float x) {
  return fusedkv::simt::bit_cast<unsigned>(x);
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}

// Leading zeros.
inline int __clz(int x) {
  return x ? __builtin_clz(unsigned(x)) : 32;
}

// 1 + index of the lowest bit, 0 for none.
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

// CUDA has these in the global namespace.
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// ---- global memory and launches
// ------------------------------------------------------------------------------

template <typename T>
inline T atomicAdd(T* address, T x, fusedkv::simt::Site site = fusedkv::simt::Site::here()) {
  fusedkv::simt::check_global(address, sizeof x, "atomicAdd", site);
  const T old = *address;
  *address = old + x;
  return old;
}

namespace fusedkv {

inline uint32_t shared_base() {
  return simt::kSharedBase;
}

template <typename T>
inline T load(const T* from, simt::Site site = simt::Site::here()) {
  simt::check_global(from, sizeof(T), "load", site);
  T x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
inline void store(T* to, const T& x, simt::Site site = simt::Site::here()) {
  simt::check_global(to, sizeof(T), "store", site);
  memcpy(to, &x, sizeof x);
}

struct DeviceLimits {
  int device;
  int sm_count;
  int shared_per_block;
};

inline int device_limits(DeviceLimits* limits) {
  *limits = {0, simt::settings().sm_count, simt::settings().shared_per_block};
  return 0;
}

template <typename Params>
int allow_shared(void (*)(Params), const DeviceLimits&) {
  return 0;
}

template <typename Params>
int blocks_per_sm(int* blocks, void (*)(Params), int, size_t shared_bytes) {
  *blocks = shared_bytes <= size_t(simt::settings().shared_per_block);
  return 0;
}

template <typename Params>
int launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void*, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  simt::run(grid, block, shared_bytes, [&] { kernel(params); });
  return 0;
}

template <typename Params>
int launch_overlapped(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                      const Params& params) {
  return launch(kernel, grid, block, shared_bytes, stream, params);
}

}  // namespace fusedkv
