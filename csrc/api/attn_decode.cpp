// attn_with_kvcache on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "api/attn_decode.h"
#include "kernels/cpu_kernels.h"

namespace fusedkv::api {

namespace {

std::tuple<Tensor, Tensor> attn_with_kvcache(Tensor q, std::vector<Tensor> key_caches,
                                             std::vector<Tensor> value_caches,
                                             std::optional<Tensor> key_weights,
                                             std::optional<Tensor> value_weights, Tensor cache_seqlens,
                                             std::optional<Tensor> block_table, double softmax_scale,
                                             int64_t window_left, int64_t window_right,
                                             std::optional<Tensor> /*schedule*/, bool /*batch_invariant*/) {
  AttnDecodeParams p = attn_params(q, key_caches, value_caches, key_weights, value_weights, false);
  const CacheLayout layout =
      cache_layout(key_caches[0], "key_caches[0]", cache_seqlens, block_table, p.B, false);
  set_options(p, layout, softmax_scale, window_left, window_right);

  std::vector<int64_t> task_offsets(p.B + 1, 0);
  bool several_splits = false;
  for (int64_t b = 0; b < p.B; ++b) {
    check_length(layout, b);
    const TokenRange seen = visible_tokens(p, p.seq_lens[b]);
    check_pages(layout, b, seen.begin, seen.end);
    const int64_t splits = num_splits(p, p.seq_lens[b]);
    several_splits |= splits > 1;
    task_offsets[b + 1] = task_offsets[b] + splits * num_row_groups(p) * p.G;
  }
  p.task_offsets = task_offsets.data();
  const int64_t tasks = task_offsets[p.B], partials = several_splits ? tasks * task_rows(p) : 0;

  Tensor out = torch::stable::new_empty(q, {p.B, p.S, p.H, p.Dv});
  Tensor lse = torch::stable::new_empty(q, {p.B, p.H, p.S}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(q, {partials * (p.Dv + 1)}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.partial_out = static_cast<float*>(partial.mutable_data_ptr());
  p.partial_lse = p.partial_out + partials * p.Dv;

  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, tasks, 1,
                              [&](int64_t begin, int64_t end) { kernels.attn_decode(p, begin, end); });
  torch::stable::parallel_for(0, p.B * num_row_groups(p) * p.G, 8,
                              [&](int64_t begin, int64_t end) { kernels.attn_decode_merge(p, begin, end); });
  return {out, lse};
}

// The CPU splits on a fixed grid: there is nothing to plan, and every result is batch-invariant.
Tensor attn_schedule(Tensor cache_seqlens, int64_t, int64_t, int64_t, int64_t, int64_t, bool) {
  return torch::stable::new_empty(cache_seqlens, {0});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("attn_schedule", TORCH_BOX(&attn_schedule));
  m.impl("attn_with_kvcache", TORCH_BOX(&attn_with_kvcache));
}

}  // namespace fusedkv::api
