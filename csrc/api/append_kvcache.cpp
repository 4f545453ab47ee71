// append_kvcache on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "api/caches.h"
#include "kernels/cpu_kernels.h"

namespace fusedkv::api {

namespace {

AppendTensor append_tensor(const Tensor& x, const char* name, const Tensor& cache, const char* cache_name,
                           const Tensor& key) {
  check_device(x, name, false);
  check_device(cache, cache_name, false);
  check_rank4(x, name, "(B, S, G, D)");
  check_rank4(cache, cache_name, "(B, capacity, G, D), or (P, page_size, G, D) with a block_table");
  check_same_dtype(x, name, key, "key");
  check_same_dtype(cache, cache_name, key, "key");
  check_value(x.size(0) == key.size(0) && x.size(1) == key.size(1), name, " has shape ", Shape{x},
              "; expected B and S of key, ", Shape{key});
  check_value(x.size(2) == cache.size(2) && x.size(3) == cache.size(3), name, " has shape ", Shape{x},
              " and ", cache_name, " has ", Shape{cache}, "; expected equal heads and head dim");
  check_head_dim(x.size(3), name);
  return {x.const_data_ptr(), x.stride(0),     x.stride(1),     x.stride(2), cache.mutable_data_ptr(),
          cache.stride(0),    cache.stride(1), cache.stride(2), x.size(2),   x.size(3)};
}

void set_rotary(AppendKVCacheParams& p, const Tensor& cos, const Tensor& sin, bool interleaved,
                int64_t longest) {
  for (const auto& [x, name] :
       {std::pair<const Tensor&, const char*>{cos, "rotary_cos"}, {sin, "rotary_sin"}}) {
    check_device(x, name, false);
    check_type(x.scalar_type() == ScalarType::Float, name, " has another dtype than float32");
    check_value(x.dim() == 2 && x.is_contiguous(), name, " has shape ", Shape{x},
                "; expected a contiguous (max_len, rotary_dim / 2)");
  }
  check_same_shape(sin, "rotary_sin", cos, "rotary_cos");
  p.rotary_dim = 2 * cos.size(1);
  check_value(p.rotary_dim <= p.key.D, "rotary_cos has shape ", Shape{cos},
              "; expected at most D / 2 = ", p.key.D / 2, " columns");
  check_value(longest <= cos.size(0), "rotary_cos has ", cos.size(0),
              " rows; expected at least the longest length ", longest);
  p.cos = static_cast<const float*>(cos.const_data_ptr());
  p.sin = static_cast<const float*>(sin.const_data_ptr());
  p.interleaved = interleaved;
}

void append_kvcache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,
                    std::optional<Tensor> block_table, std::optional<Tensor> rotary_cos,
                    std::optional<Tensor> rotary_sin, bool rotary_interleaved) {
  check_rank4(key, "key", "(B, S, G, D)");
  AppendKVCacheParams p{};
  p.dtype = dtype_of(key, "key");
  p.B = key.size(0);
  p.S = key.size(1);
  p.key = append_tensor(key, "key", key_cache, "key_cache", key);
  p.value = append_tensor(value, "value", value_cache, "value_cache", key);
  for (int64_t i = 0; i < 2; ++i)
    check_value(value_cache.size(i) == key_cache.size(i), "value_cache has shape ", Shape{value_cache},
                "; expected ", Shape{key_cache}, " in its first two dims, as key_cache has");
  const CacheLayout layout = cache_layout(key_cache, "key_cache", cache_seqlens, block_table, p.B, false);
  p.seq_lens = layout.seq_lens;
  p.block_table = layout.block_table;
  p.block_table_stride = layout.block_table_stride;
  p.page_size = layout.page_size;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    check_length(layout, b);
    const int64_t len = p.seq_lens[b];
    check_pages(layout, b, len > p.S ? len - p.S : 0, len);
    longest = len > longest ? len : longest;
  }
  check_value(rotary_cos.has_value() == rotary_sin.has_value(),
              "rotary_cos and rotary_sin come together; one is missing");
  if (rotary_cos) set_rotary(p, *rotary_cos, *rotary_sin, rotary_interleaved, longest);

  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, p.B * p.S, 16,
                              [&](int64_t begin, int64_t end) { kernels.append_kvcache(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("append_kvcache", TORCH_BOX(&append_kvcache));
}

}  // namespace fusedkv::api
