// append_kvcache on the CPU.

#include "api/append_kvcache.h"

#include "cpu/simd_targets.h"

namespace fusedkv::api {

namespace {

// Checks the contents of tensors: lengths within the capacity, pages that exist, angles for all positions.
void check_contents(const AppendCall& call) {
  const AppendKVCacheParams& p = call.params;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    check_length(call.layout, b);
    const int64_t len = p.seq_lens[b];
    check_pages(call.layout, b, len > p.S ? len - p.S : 0, len);
    longest = len > longest ? len : longest;
  }
  check_value(!p.cos || longest <= p.rotary_rows, "rotary_cos must have at least ", longest,
              " rows, the longest length, got ", p.rotary_rows);
}

Tensor append_kvcache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,
                      std::optional<Tensor> block_table, std::optional<Tensor> rotary_cos,
                      std::optional<Tensor> rotary_sin, bool rotary_interleaved, std::optional<Tensor> query,
                      std::optional<Tensor> key_scale, std::optional<Tensor> key_center,
                      std::optional<Tensor> value_scale, std::optional<Tensor> value_center) {
  const AppendArguments arguments{key,         value,      key_cache,   value_cache,        cache_seqlens,
                                  block_table, rotary_cos, rotary_sin,  rotary_interleaved, query,
                                  key_scale,   key_center, value_scale, value_center};
  const AppendCall call = append_call(arguments, /*cuda=*/false);
  check_contents(call);
  begin_writes(arguments);
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, call.params.B * call.params.S, 16, [&](int64_t begin, int64_t end) {
    kernels.append_kvcache(call.params, begin, end);
  });
  return call.rotated;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("append_kvcache", TORCH_BOX(&append_kvcache));
}

}  // namespace fusedkv::api
