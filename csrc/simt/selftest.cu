// Small kernels whose result is known. Those of the first part are one instruction each, seen lane by lane;
// those of the second give out[i] = a[n - 1 - i] as long as `fault` is 0, and are wrong in one way each when
// it is 1. What passes between threads goes through shared memory, one block of up to 128 threads.

#include "simt/selftest.h"

#include <cstring>

#include "simt/device.h"

namespace fusedkv::simt {

namespace {

__device__ uint32_t word(int index) {
  return shared_base() + 4 * uint32_t(index);
}

// ---- one instruction
// -------------------------------------------------------------------------------------------

__device__ void load_fragments(const SelfTest& p, uint32_t (&a)[4], uint32_t (&b)[2]) {
  for (int r = 0; r < 4; ++r) a[r] = load(p.a + 4 * threadIdx.x + r);
  for (int r = 0; r < 2; ++r) b[r] = load(p.b + 2 * threadIdx.x + r);
}

__global__ void mma_bf16(const __grid_constant__ SelfTest p) {
  uint32_t a[4], b[2];
  float c[4] = {0, 0, 0, 0};
  load_fragments(p, a, b);
  ptx::mma_m16n8k16_bf16(c, a, b);
  ptx::mma_m16n8k16_bf16(c, a, b);  // adds to c: twice the product
  for (int r = 0; r < 4; ++r) store(p.out + 4 * threadIdx.x + r, __float_as_uint(c[r]));
}

__global__ void mma_f16(const __grid_constant__ SelfTest p) {
  uint32_t a[4], b[2];
  float c[4] = {0, 0, 0, 0};
  load_fragments(p, a, b);
  ptx::mma_m16n8k16_f16(c, a, b);
  ptx::mma_m16n8k16_f16(c, a, b);
  for (int r = 0; r < 4; ++r) store(p.out + 4 * threadIdx.x + r, __float_as_uint(c[r]));
}

// b[i]: which 16-byte row of `a` lane i names.
__device__ uint32_t row_address(const SelfTest& p) {
  for (int i = 0; i < 4; ++i)
    ptx::st_shared_b32(word(32 * i + threadIdx.x), load(p.a + 32 * i + threadIdx.x));
  __syncwarp();
  return word(4 * int(load(p.b + threadIdx.x)));
}

__global__ void ldmatrix(const __grid_constant__ SelfTest p) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, row_address(p));
  for (int i = 0; i < 4; ++i) store(p.out + 4 * threadIdx.x + i, r[i]);
}

__global__ void ldmatrix_trans(const __grid_constant__ SelfTest p) {
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, row_address(p));
  for (int i = 0; i < 4; ++i) store(p.out + 4 * threadIdx.x + i, r[i]);
}

__global__ void movmatrix(const __grid_constant__ SelfTest p) {
  store(p.out + threadIdx.x, ptx::movmatrix_trans(load(p.a + threadIdx.x)));
}

// Eight results per lane of shuffles and votes among all lanes and in segments.
__global__ void shuffles(const __grid_constant__ SelfTest p) {
  const int lane = threadIdx.x;
  const unsigned x = load(p.a + lane), all = 0xffffffff;
  uint32_t* out = p.out + 8 * lane;
  store(out + 0, __shfl_sync(all, x, (lane * 7 + 3) % 32));
  store(out + 1, __shfl_sync(all, x, 5, 8));
  store(out + 2, __shfl_xor_sync(all, x, 9));
  store(out + 3, __shfl_down_sync(all, x, 3, 16));
  store(out + 4, __shfl_up_sync(all, x, 3));
  store(out + 5, __ballot_sync(all, x & 1));
  const unsigned third = lane % 3 == 0 ? 0x49249249 : ~0x49249249u;  // two groups at a time
  store(out + 6, unsigned(__any_sync(third, x & 2)) | unsigned(__all_sync(third, x & 4)) << 1);
  const uint64_t wide = __shfl_xor_sync(all, uint64_t(x) << 32 | unsigned(lane), 1);
  store(out + 7, unsigned(wide >> 32) ^ unsigned(wide));
}

// bf16 in the low half, f16 in the high half of each out[i]; out[n + i] is the low half of a[i] widened.
__global__ void conversions(const __grid_constant__ SelfTest p) {
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    const uint32_t bits = load(p.a + i);
    const float x = __uint_as_float(bits);
    store(p.out + i, (ptx::cvt_bf16x2(x, 0.f) & 0xffff) | ptx::cvt_f16x2(0.f, x));
    store(p.out + p.n + i, __float_as_uint(ptx::cvt_f32_f16(uint16_t(bits))));
  }
}

// ---- planted faults
// --------------------------------------------------------------------------------------------

__global__ void missing_syncthreads(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  ptx::st_shared_b32(word(t), load(p.a + t));
  if (!p.fault) __syncthreads();
  store(p.out + t, ptx::ld_shared_b32(word(p.n - 1 - t)));
}

__global__ void missing_syncwarp(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x, warp = t / 32 * 32;
  ptx::st_shared_b32(word(t), load(p.a + t));
  if (!p.fault) __syncwarp();
  store(p.out + p.n - 32 - warp + t % 32, ptx::ld_shared_b32(word(warp + 31 - t % 32)));
}

// The first use of the same words of shared memory is not over when the second begins.
__global__ void missing_second_barrier(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  ptx::st_shared_b32(word(t), load(p.a + p.n - 1 - t));
  __syncthreads();
  const uint32_t reversed = ptx::ld_shared_b32(word(p.n - 1 - t));
  if (!p.fault) __syncthreads();
  ptx::st_shared_b32(word(t), reversed);
  __syncthreads();
  store(p.out + t, ptx::ld_shared_b32(word(p.n - 1 - t)));
}

__global__ void shared_out_of_bounds(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  ptx::st_shared_b32(word(t + p.fault), load(p.a + t));
  __syncthreads();
  store(p.out + t, ptx::ld_shared_b32(word(p.n - 1 - t)));
}

__global__ void shared_not_aligned(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  ptx::st_shared_b32(word(t) + 2 * p.fault, load(p.a + t));
  __syncthreads();
  store(p.out + t, ptx::ld_shared_b32(word(p.n - 1 - t)));
}

__global__ void global_load_out_of_bounds(const __grid_constant__ SelfTest p) {
  store(p.out + threadIdx.x, load(p.a + p.n - 1 - int(threadIdx.x) - p.fault));
}

__global__ void global_store_out_of_bounds(const __grid_constant__ SelfTest p) {
  store(p.out + int(threadIdx.x) + p.fault, load(p.a + p.n - 1 - int(threadIdx.x)));
}

__global__ void global_not_aligned(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  if (t % 4) return;
  const uint4 x = load(reinterpret_cast<const uint4*>(p.a + p.n - 4 - t + p.fault));
  store(reinterpret_cast<uint4*>(p.out + t), make_uint4(x.w, x.z, x.y, x.x));
}

__global__ void divergent_syncthreads(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  ptx::st_shared_b32(word(t), load(p.a + t));
  if (p.fault && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store(p.out + t, ptx::ld_shared_b32(word(p.n - 1 - t)));
}

__global__ void skipped_syncthreads(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  ptx::st_shared_b32(word(t), load(p.a + t));
  if (!p.fault || t != 7) __syncthreads();
  store(p.out + t, ptx::ld_shared_b32(word(p.n - 1 - t)));
}

__global__ void exited_lane_in_mask(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  const uint32_t x = load(p.a + p.n - 32 - t / 32 * 32 + t % 32);
  if (p.fault && t == 40) return;
  store(p.out + t, __shfl_sync(0xffffffffu, x, 31 - t % 32));
}

__global__ void lane_that_does_not_come(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  const uint32_t x = load(p.a + p.n - 1 - t);
  if (p.fault && t == 40) __syncthreads();
  store(p.out + t, __shfl_xor_sync(0xffffffffu, x, 0));
  if (!p.fault || t != 40) __syncthreads();
}

__global__ void divergent_collective(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x;
  uint32_t x = load(p.a + p.n - 1 - t);
  if (p.fault && t % 32 < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 0);
  } else {
    x = __shfl_xor_sync(0xffffffffu, x, 0);
  }
  store(p.out + t, x);
}

__global__ void shuffle_from_outside_the_mask(const __grid_constant__ SelfTest p) {
  const int t = threadIdx.x, half = t % 32 / 16 * 16;
  const uint32_t x = load(p.a + p.n - 1 - t);
  store(p.out + t, __shfl_sync(0xffffu << half, x, p.fault ? (t + 16) % 32 : t % 32));
}

// ---- planted faults in a ring of stages that cp.async fills
// ------------------------------------------------------

enum Mistake { kNone, kNoWait, kShortWait, kNoCommit, kOverwrite };
constexpr int kStages = 3, kPieces = 64;

__device__ void issue(const SelfTest& p, int tile, Mistake mistake) {
  const int piece = tile * kPieces + int(threadIdx.x);
  const bool in = 4 * piece < p.n;
  ptx::cp_async_16(word(4 * (tile % kStages * kPieces + int(threadIdx.x))), p.a + (in ? 4 * piece : 0),
                   in ? 16 : 0);
  if (mistake != kNoCommit) ptx::cp_async_commit();
}

// Tiles of 64 pieces of 16 bytes; each thread copies one piece of a tile and uses that of another thread.
template <Mistake kMistake>
__global__ void ring(const __grid_constant__ SelfTest p) {
  const Mistake mistake = p.fault ? kMistake : kNone;
  const int t = threadIdx.x, tiles = p.n / (4 * kPieces);
  for (int tile = 0; tile < kStages - 1; ++tile) issue(p, tile, mistake);
  for (int tile = 0; tile < tiles; ++tile) {
    if (mistake == kShortWait)
      ptx::cp_async_wait<kStages - 1>();
    else if (mistake != kNoWait)
      ptx::cp_async_wait<kStages - 2>();
    // Until all have passed the barrier, some may still read the stage that is filled next.
    if (mistake == kOverwrite) issue(p, tile + kStages - 1, mistake);
    __syncthreads();
    const uint4 x = ptx::ld_shared_b128(word(4 * (tile % kStages * kPieces + kPieces - 1 - t)));
    const int target = p.n - 4 * ((tile + 1) * kPieces - t);
    store(reinterpret_cast<uint4*>(p.out + target), make_uint4(x.w, x.z, x.y, x.x));
    if (mistake != kOverwrite) issue(p, tile + kStages - 1, mistake);
  }
}

struct Entry {
  const char* name;
  void (*kernel)(SelfTest);
  int threads;
  size_t shared_words;
};

const Entry kEntries[] = {
    {"mma_bf16", mma_bf16, 32, 0},
    {"mma_f16", mma_f16, 32, 0},
    {"ldmatrix", ldmatrix, 32, 128},
    {"ldmatrix_trans", ldmatrix_trans, 32, 128},
    {"movmatrix", movmatrix, 32, 0},
    {"shuffles", shuffles, 32, 0},
    {"conversions", conversions, 32, 0},
    {"missing_syncthreads", missing_syncthreads, 128, 128},
    {"missing_syncwarp", missing_syncwarp, 128, 128},
    {"missing_second_barrier", missing_second_barrier, 128, 128},
    {"shared_out_of_bounds", shared_out_of_bounds, 128, 128},
    {"shared_not_aligned", shared_not_aligned, 128, 129},
    {"global_load_out_of_bounds", global_load_out_of_bounds, 128, 0},
    {"global_store_out_of_bounds", global_store_out_of_bounds, 128, 0},
    {"global_not_aligned", global_not_aligned, 128, 0},
    {"divergent_syncthreads", divergent_syncthreads, 128, 128},
    {"skipped_syncthreads", skipped_syncthreads, 128, 128},
    {"exited_lane_in_mask", exited_lane_in_mask, 128, 0},
    {"lane_that_does_not_come", lane_that_does_not_come, 128, 0},
    {"divergent_collective", divergent_collective, 128, 0},
    {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask, 128, 0},
    {"missing_wait", ring<kNoWait>, kPieces, 4 * kStages * kPieces},
    {"short_wait", ring<kShortWait>, kPieces, 4 * kStages * kPieces},
    {"missing_commit", ring<kNoCommit>, kPieces, 4 * kStages * kPieces},
    {"stage_overwritten_in_use", ring<kOverwrite>, kPieces, 4 * kStages * kPieces},
};

}  // namespace

bool run_selftest(const char* name, const SelfTest& p) {
  for (const Entry& entry : kEntries)
    if (strcmp(entry.name, name) == 0) {
      launch(entry.kernel, dim3(1), dim3(unsigned(entry.threads)), 4 * entry.shared_words, nullptr, p);
      return true;
    }
  return false;
}

}  // namespace fusedkv::simt
