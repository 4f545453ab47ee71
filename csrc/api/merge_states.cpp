// merge_states on the CPU.

#include "api/merge_states.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/simd_targets.h"

namespace fusedkv::api {

namespace {

// Minimum elements per thread: less is not worth waking one.
constexpr int64_t kGrain = 32 * 1024;

std::tuple<Tensor, Tensor> merge_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  const MergedStates merged = merged_states(outs, lses, /*cuda=*/false);
  const MergeStatesParams& p = merged.params;
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, p.B * p.S * p.H, std::max<int64_t>(kGrain / (p.n * p.D), 1),
                              [&](int64_t begin, int64_t end) { kernels.merge_states(p, begin, end); });
  return {merged.out, merged.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

}  // namespace fusedkv::api
