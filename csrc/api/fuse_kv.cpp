// fuse_kv and fuse_kv_backward on the CPU.

#include "api/fuse_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "kernels/cpu_kernels.h"

namespace fusedkv::api {

namespace {

// At least this many bytes per thread: less is not worth waking one.
constexpr int64_t kGrainBytes = 64 * 1024;

int64_t token_grain(const FuseKVParams& p) {
  const int64_t bytes = (p.m + 1) * p.G * p.D * size_of(p.dtype);
  return bytes ? (kGrainBytes + bytes - 1) / bytes : 1;
}

Tensor fuse_kv(std::vector<Tensor> sources, Tensor weights) {
  FuseKVParams p = fuse_kv_params(sources, weights, /*cuda=*/false);
  Tensor out = torch::stable::new_empty(sources[0], {p.B, p.T, p.G, p.D});
  p.out = out.mutable_data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, p.B * p.T, token_grain(p),
                              [&](int64_t begin, int64_t end) { kernels.fuse_kv_forward(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> fuse_kv_backward(Tensor grad, std::vector<Tensor> sources, Tensor weights,
                                            bool needs_sources, bool needs_weights) {
  FuseKVParams p = fuse_kv_params(sources, weights, /*cuda=*/false);
  check_device(grad, "grad", false);
  check_same_shape(grad, "grad", sources[0], "sources[0]");
  check_same_dtype(grad, "grad", sources[0], "sources[0]");
  check_value(grad.is_contiguous(), "grad is not contiguous");
  const int64_t chunks = (p.B * p.T + kFuseChunkTokens - 1) / kFuseChunkTokens;
  p.grad_out = grad.const_data_ptr();
  Tensor grad_sources = needs_sources ? torch::stable::new_empty(grad, {p.m, p.B, p.T, p.G, p.D})
                                      : torch::stable::new_empty(grad, {0});
  Tensor grad_weights = torch::stable::new_empty(weights, {needs_weights ? p.m : 0, p.G, p.D});
  Tensor partial = torch::stable::new_empty(weights, {needs_weights ? chunks : 0, p.m, p.G, p.D});
  p.grad_sources = needs_sources ? grad_sources.mutable_data_ptr() : nullptr;
  p.grad_weights = needs_weights ? grad_weights.mutable_data_ptr() : nullptr;
  p.partial_weights = needs_weights ? partial.mutable_data_ptr() : nullptr;
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, chunks, 1,
                              [&](int64_t begin, int64_t end) { kernels.fuse_kv_backward(p, begin, end); });
  if (needs_weights) {
    const int64_t blocks = p.m * p.G * p.D / 8;
    torch::stable::parallel_for(
        0, blocks, kGrainBytes / (32 * (chunks + 1)) + 1,
        [&](int64_t begin, int64_t end) { kernels.fuse_kv_reduce_weights(p, begin, end); });
  }
  return {grad_sources, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("fuse_kv", TORCH_BOX(&fuse_kv));
  m.impl("fuse_kv_backward", TORCH_BOX(&fuse_kv_backward));
}

}  // namespace fusedkv::api
