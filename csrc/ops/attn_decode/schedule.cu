// schedule[b] = sum of sequence_cost over the sequences before b, for b = 0 .. B; counters = 0.
//
// One block, once per step. Lengths stay on the device, so the host does not wait.

#include "ops/attn_decode/cuda_params.h"
#include "ops/attn_decode/work.cuh"

namespace fusedkv {

namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    attn_schedule_kernel(const __grid_constant__ AttnScheduleParams p) {
  ptx::grid_dependency_wait();
  for (int64_t i = threadIdx.x; i < p.num_counters; i += kThreads) store(p.counters + i, 0);
  sum_costs(p.costs, kThreads, shared_base(), [&](int64_t b, int sum) { store(p.schedule + b, sum); });
}

}  // namespace

int attn_schedule_cuda(const AttnScheduleParams& p, void* stream) {
  return launch_overlapped(attn_schedule_kernel, dim3(1), dim3(kThreads), kThreads / 32 * 4, stream, p);
}

}  // namespace fusedkv
