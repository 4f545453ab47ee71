// Parameters of append_kvcache from its arguments, the same on every backend.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <utility>

#include "api/caches.h"
#include "api/new_tensor.h"
#include "api/writes.h"
#include "ops/append_kvcache/params.h"

namespace fusedkv::api {

// The arguments of the op, in their order.
struct AppendArguments {
  Tensor key, value, key_cache, value_cache, cache_seqlens;
  std::optional<Tensor> block_table, rotary_cos, rotary_sin;
  bool rotary_interleaved;
  std::optional<Tensor> query;
};

struct AppendCall {
  AppendKVCacheParams params{};
  CacheLayout layout;
  Tensor rotated;  // the queries' new tensor; empty without a query
};

inline AppendTensor append_tensor(const Tensor& x, const char* name, const Tensor& cache,
                                  const char* cache_name, const Tensor& key, bool cuda) {
  check_device(x, name, cuda);
  check_device(cache, cache_name, cuda);
  check_rank4(x, name, "(B, S, G, D)");
  check_rank4(cache, cache_name, "(B, capacity, G, D), or (P, page_size, G, D) with a block_table");
  check_same_dtype(x, name, key, "key");
  check_same_dtype(cache, cache_name, key, "key");
  check_value(x.size(0) == key.size(0) && x.size(1) == key.size(1), name, " must have B and S of key, ",
              Shape{key}, ", got ", Shape{x});
  check_value(x.size(2) == cache.size(2) && x.size(3) == cache.size(3), name,
              " must have the heads and head dim of ", cache_name, ", ", Shape{cache}, ", got ", Shape{x});
  check_has_channels(x.size(3), name);
  return {x.const_data_ptr(), x.stride(0),     x.stride(1),     x.stride(2), cache.mutable_data_ptr(),
          cache.stride(0),    cache.stride(1), cache.stride(2), x.size(2),   x.size(3)};
}

inline void set_rotary(AppendKVCacheParams& p, const Tensor& cos, const Tensor& sin, bool interleaved,
                       bool cuda) {
  for (const auto& [x, name] :
       {std::pair<const Tensor&, const char*>{cos, "rotary_cos"}, {sin, "rotary_sin"}}) {
    check_device(x, name, cuda);
    check_type(x.scalar_type() == ScalarType::Float, name, " must be float32, got ", DTypeOf{x});
    check_value(x.dim() == 2 && x.is_contiguous(), name,
                " must be contiguous of shape (max_len, rotary_dim / 2), got ", Shape{x});
  }
  check_same_shape(sin, "rotary_sin", cos, "rotary_cos");
  p.rotary_dim = 2 * cos.size(1);
  check_value(p.rotary_dim <= p.key.D, "rotary_cos must have at most D / 2 = ", p.key.D / 2, " columns, got ",
              Shape{cos});
  p.cos = static_cast<const float*>(cos.const_data_ptr());
  p.sin = static_cast<const float*>(sin.const_data_ptr());
  p.rotary_rows = cos.size(0);
  p.interleaved = interleaved;
}

// Checks everything but the contents of tensors, and allocates the rotated queries.
inline AppendCall append_call(const AppendArguments& x, bool cuda) {
  check_rank4(x.key, "key", "(B, S, G, D)");
  AppendCall call;
  AppendKVCacheParams& p = call.params;
  p.dtype = dtype_of(x.key, "key");
  p.B = x.key.size(0);
  p.S = x.key.size(1);
  p.key = append_tensor(x.key, "key", x.key_cache, "key_cache", x.key, cuda);
  p.value = append_tensor(x.value, "value", x.value_cache, "value_cache", x.key, cuda);
  for (int64_t i = 0; i < 2; ++i)
    check_value(x.value_cache.size(i) == x.key_cache.size(i),
                "value_cache must have the first two dims of key_cache, ", Shape{x.key_cache}, ", got ",
                Shape{x.value_cache});
  call.layout = cache_layout(x.key_cache, "key_cache", x.cache_seqlens, x.block_table, p.B, cuda);
  p.seq_lens = call.layout.seq_lens;
  p.block_table = call.layout.block_table;
  p.block_table_stride = call.layout.block_table_stride;
  p.capacity = call.layout.capacity;
  p.num_pages = call.layout.num_pages;
  p.page_size = call.layout.page_size;
  check_value(x.rotary_cos.has_value() == x.rotary_sin.has_value(),
              "rotary_cos and rotary_sin must be passed together, got one of them");
  if (x.rotary_cos) set_rotary(p, *x.rotary_cos, *x.rotary_sin, x.rotary_interleaved, cuda);
  if (!x.query) {
    call.rotated = empty_tensor(x.key, {0}, dtype_code(x.key));
    return call;
  }
  const Tensor& query = *x.query;
  check_value(x.rotary_cos.has_value(), "query must be passed with rotary_cos and rotary_sin, got none");
  check_rank4(query, "query", "(B, S, H, D)");
  call.rotated =
      empty_tensor(query, {query.size(0), query.size(1), query.size(2), query.size(3)}, dtype_code(query));
  p.query = append_tensor(query, "query", call.rotated, "query", x.key, cuda);
  check_value(p.query.D == p.key.D, "query must have the head dim of key, ", p.key.D, ", got ", Shape{query});
  return call;
}

// The last step before the caches are written. Elements of a cache may not overlap each other or another
// argument: the result would depend on the order of writes.
inline void begin_writes(const AppendArguments& x) {
  const Extent keys(x.key_cache, "key_cache"), values(x.value_cache, "value_cache");
  check_own_memory(keys);
  check_own_memory(values);
  check_apart(keys, values);
  const auto check = [&](const Tensor& read, const char* name) {
    const Extent other(read, name);
    check_apart(keys, other);
    check_apart(values, other);
  };
  check(x.key, "key");
  check(x.value, "value");
  check(x.cache_seqlens, "cache_seqlens");
  if (x.block_table) check(*x.block_table, "block_table");
  if (x.rotary_cos) check(*x.rotary_cos, "rotary_cos");
  if (x.rotary_sin) check(*x.rotary_sin, "rotary_sin");
  if (x.query) check(*x.query, "query");
  count_write(x.key_cache, "key_cache");
  count_write(x.value_cache, "value_cache");
}

}  // namespace fusedkv::api
