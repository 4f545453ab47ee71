// schedule[b] = sum of sequence_cost over the sequences before b, for b = 0 .. B; counters = 0.
//
// One block, once per step. Lengths stay on the device, so the host does not wait. 1024 sequences at a time
// are summed within warps, then over the warps.

#include "ops/attn_decode/cuda_params.h"
#include "ops/attn_decode/work.cuh"

namespace fusedkv {

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;

// The sum of x over the lanes up to and including this one.
__device__ __forceinline__ int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const int before = __shfl_sync(kFullWarp, x, lane >= apart ? lane - apart : lane);
    x += lane >= apart ? before : 0;
  }
  return x;
}

__global__ void __launch_bounds__(kThreads)
    attn_schedule_kernel(const __grid_constant__ AttnScheduleParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t i = threadIdx.x; i < p.num_counters; i += kThreads) store(p.counters + i, 0);
  int before = 0;  // the cost of all sequences of earlier rounds
  for (int64_t round = 0; round < p.B; round += kThreads) {
    const int64_t b = round + threadIdx.x;
    int cost = 0;
    if (b < p.B)
      cost = sequence_cost(visible_kv_tiles(load(p.seq_lens + b), p.S, p.capacity, p.window_left),
                           p.batch_invariant);
    const int in_warp = inclusive_sum(cost);
    if (lane == 31) ptx::st_shared_b32(shared_base() + warp * 4, in_warp);
    __syncthreads();
    const int up_to_warp = inclusive_sum(int(ptx::ld_shared_b32(shared_base() + lane * 4)));
    const int earlier_warps = __shfl_sync(kFullWarp, up_to_warp, warp == 0 ? 0 : warp - 1);
    if (b < p.B) store(p.schedule + b, before + in_warp - cost + (warp == 0 ? 0 : earlier_warps));
    before += __shfl_sync(kFullWarp, up_to_warp, 31);
    __syncthreads();  // all warps have read the sums
  }
  if (threadIdx.x == 0) store(p.schedule + p.B, before);
}

}  // namespace

int attn_schedule_cuda(const AttnScheduleParams& p, void* stream) {
  return launch(attn_schedule_kernel, dim3(1), dim3(kThreads), kWarps * 4, stream, p);
}

}  // namespace fusedkv
