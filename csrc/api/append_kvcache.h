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
  std::optional<Tensor> key_scale, key_center, value_scale, value_center;
};

struct AppendCall {
  AppendKVCacheParams params{};
  CacheLayout layout;
  Tensor rotated;  // the queries' new tensor; empty without a query
};

// The float32 (heads, D) scale or center of a tensor that is encoded; nullptr if there is none.
inline const float* code_parameter(const std::optional<Tensor>& given, const char* name, const Tensor& x,
                                   bool cuda) {
  if (!given) return nullptr;
  check_device(*given, name, cuda);
  check_type(given->scalar_type() == ScalarType::Float, name, " must be float32, got ", DTypeOf{*given},
             "; convert it with .float()");
  check_value(given->dim() == 2 && given->size(0) == x.size(2) && given->size(1) == x.size(3) &&
                  given->is_contiguous(),
              name, " must be contiguous of shape (G, D) = (", x.size(2), ", ", x.size(3), "), got ",
              Shape{*given});
  return static_cast<const float*>(given->const_data_ptr());
}

// How a tensor is encoded: names of the scale and the center, and what was given.
struct CodeArguments {
  const char *scale_name, *center_name;
  const std::optional<Tensor>&scale, &center;
};

// New tokens for a cache of codes: codes of its dtype, or numbers to encode.
inline void set_code(AppendTensor* out, const Tensor& x, const char* name, const Tensor& cache,
                     const char* cache_name, const CodeArguments& code, bool cuda) {
  const bool copied = x.scalar_type() == cache.scalar_type();
  check_value(!copied || (!code.scale && !code.center), code.scale_name, " and ", code.center_name,
              " must be None for a ", name, " that has codes already, got a tensor");
  if (!copied) {
    check_type(code_of(x) == CacheCode::raw && x.scalar_type() != ScalarType::Double, name,
               " must be float32, bfloat16 or float16, or ", DTypeOf{cache}, " as ", cache_name, ", got ",
               DTypeOf{x});
    check_value(code.scale.has_value(), code.scale_name, " must be given to encode ", name, " into ",
                cache_name, " of ", DTypeOf{cache}, ", got None");
    check_value(x.size(3) <= kMaxHeadDim && (out->code != CacheCode::i4 || x.size(3) % 2 == 0), name,
                " must have an even head dim of at most ", kMaxHeadDim, " to be encoded, got ", x.size(3));
  }
  out->scale = code_parameter(code.scale, code.scale_name, x, cuda);
  out->center = code_parameter(code.center, code.center_name, x, cuda);
}

inline AppendTensor append_tensor(const Tensor& x, const char* name, const Tensor& cache,
                                  const char* cache_name, const Tensor& like, const char* like_name,
                                  const Tensor& key, const CodeArguments* code, bool cuda) {
  check_device(x, name, cuda);
  check_device(cache, cache_name, cuda);
  check_rank4(x, name, "(B, S, G, D)");
  check_rank4(cache, cache_name, "(B, capacity, G, D), or (P, page_size, G, D) with a block_table");
  AppendTensor out{};
  out.code = code ? code_of(cache) : CacheCode::raw;
  if (out.code == CacheCode::raw || x.scalar_type() != cache.scalar_type())
    check_same_dtype(x, name, like, like_name);
  if (out.code == CacheCode::raw) check_same_dtype(cache, cache_name, like, like_name);
  check_value(x.size(0) == key.size(0) && x.size(1) == key.size(1), name, " must have B and S of key, ",
              Shape{key}, ", got ", Shape{x});
  const bool encoded = out.code != CacheCode::raw && x.scalar_type() != cache.scalar_type();
  const int64_t channels = encoded ? channels_of(cache, out.code) : cache.size(3);
  check_value(x.size(2) == cache.size(2) && x.size(3) == channels, name,
              " must have the heads and head dim of ", cache_name, ", ", Shape{cache},
              encoded && out.code == CacheCode::i4 ? " of two codes each" : "", ", got ", Shape{x});
  check_has_channels(x.size(3), name);
  out.src = x.const_data_ptr();
  out.src_stride_b = x.stride(0);
  out.src_stride_s = x.stride(1);
  out.src_stride_g = x.stride(2);
  out.dst = cache.mutable_data_ptr();
  out.dst_stride_b = cache.stride(0);
  out.dst_stride_t = cache.stride(1);
  out.dst_stride_g = cache.stride(2);
  out.heads = x.size(2);
  out.D = out.code == CacheCode::raw ? x.size(3) : channels_of(cache, out.code);
  if (code && out.code == CacheCode::raw)
    check_value(!code->scale && !code->center, code->scale_name, " and ", code->center_name,
                " must be None for a ", cache_name, " of ", DTypeOf{cache}, ", got a tensor");
  else if (code)
    set_code(&out, x, name, cache, cache_name, *code, cuda);
  return out;
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
  // What is not codes has one dtype, that of the first such tensor.
  const bool key_is_code = code_of(x.key) != CacheCode::raw,
             value_is_code = code_of(x.value) != CacheCode::raw;
  const Tensor& like = !key_is_code ? x.key : !value_is_code ? x.value : x.query ? *x.query : x.key;
  const char* like_name = !key_is_code ? "key" : !value_is_code ? "value" : "query";
  p.dtype = code_of(like) == CacheCode::raw ? dtype_of(like, like_name) : DType::bf16;
  p.B = x.key.size(0);
  p.S = x.key.size(1);
  const CodeArguments key_code{"key_scale", "key_center", x.key_scale, x.key_center},
      value_code{"value_scale", "value_center", x.value_scale, x.value_center};
  p.key = append_tensor(x.key, "key", x.key_cache, "key_cache", like, like_name, x.key, &key_code, cuda);
  p.value = append_tensor(x.value, "value", x.value_cache, "value_cache", like, like_name, x.key, &value_code,
                          cuda);
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
  check_value(!x.rotary_cos || !key_is_code,
              "rotary_cos must be None for a key that has codes already, got a tensor");
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
  p.query = append_tensor(query, "query", call.rotated, "query", like, like_name, x.key, nullptr, cuda);
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
  if (x.key_scale) check(*x.key_scale, "key_scale");
  if (x.key_center) check(*x.key_center, "key_center");
  if (x.value_scale) check(*x.value_scale, "value_scale");
  if (x.value_center) check(*x.value_center, "value_center");
  count_write(x.key_cache, "key_cache");
  count_write(x.value_cache, "value_cache");
}

}  // namespace fusedkv::api
