// Checks and parameters of cached attention that the CPU and the CUDA registration share.
#pragma once

#include <cfloat>
#include <tuple>
#include <utility>

#include "api/caches.h"
#include "api/new_tensor.h"
#include "api/writes.h"
#include "ops/attn_decode/params.h"

namespace fusedkv::api {

// The arguments of attn_with_kvcache, in their order; then those that attn_with_kvcache_out writes.
struct AttnArguments {
  Tensor q;
  std::vector<Tensor> key_caches, value_caches;
  std::optional<Tensor> key_weights, value_weights;
  Tensor cache_seqlens;
  std::optional<Tensor> block_table;
  double softmax_scale;
  int64_t window_left, window_right;
  std::optional<Tensor> schedule;
  bool batch_invariant;
  std::optional<Tensor> cu_seqlens_q;
  int64_t max_seqlen_q;
  double softcap;
  std::optional<Tensor> sinks, alibi_slopes;
  std::optional<Tensor> codebook;
  std::optional<std::vector<Tensor>> key_token_scales, value_token_scales;
  std::optional<Tensor> q_sources, value_bias;
  std::optional<Tensor> out = std::nullopt, workspace = std::nullopt;

  // Calls f(tensor, name) for every input.
  template <typename F>
  void for_each_input(const F& f) const {
    f(q, Name("q"));
    for (size_t j = 0; j < key_caches.size(); ++j) f(key_caches[j], name_of("key_caches", j));
    for (size_t j = 0; j < value_caches.size(); ++j) f(value_caches[j], name_of("value_caches", j));
    f(cache_seqlens, Name("cache_seqlens"));
    const auto optional = [&](const std::optional<Tensor>& x, const char* name) {
      if (x) f(*x, Name(name));
    };
    optional(key_weights, "key_weights");
    optional(value_weights, "value_weights");
    optional(block_table, "block_table");
    optional(schedule, "schedule");
    optional(cu_seqlens_q, "cu_seqlens_q");
    optional(sinks, "sinks");
    optional(alibi_slopes, "alibi_slopes");
    optional(codebook, "codebook");
    optional(q_sources, "q_sources");
    optional(value_bias, "value_bias");
    const auto each = [&](const std::optional<std::vector<Tensor>>& list, const char* name) {
      for (size_t j = 0; list && j < list->size(); ++j) f((*list)[j], name_of(name, j));
    };
    each(key_token_scales, "key_token_scales");
    each(value_token_scales, "value_token_scales");
  }
};

using AttnResults = std::tuple<Tensor, Tensor>;  // out and lse

// The ops of a backend, from its function of the arguments.
template <AttnResults (*attend)(const AttnArguments&)>
AttnResults attn_with_kvcache(Tensor q, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches,
                              std::optional<Tensor> key_weights, std::optional<Tensor> value_weights,
                              Tensor cache_seqlens, std::optional<Tensor> block_table, double softmax_scale,
                              int64_t window_left, int64_t window_right, std::optional<Tensor> schedule,
                              bool batch_invariant, std::optional<Tensor> cu_seqlens_q, int64_t max_seqlen_q,
                              double softcap, std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                              std::optional<Tensor> codebook,
                              std::optional<std::vector<Tensor>> key_token_scales,
                              std::optional<std::vector<Tensor>> value_token_scales,
                              std::optional<Tensor> q_sources, std::optional<Tensor> value_bias) {
  return attend({std::move(q),
                 std::move(key_caches),
                 std::move(value_caches),
                 std::move(key_weights),
                 std::move(value_weights),
                 std::move(cache_seqlens),
                 std::move(block_table),
                 softmax_scale,
                 window_left,
                 window_right,
                 std::move(schedule),
                 batch_invariant,
                 std::move(cu_seqlens_q),
                 max_seqlen_q,
                 softcap,
                 std::move(sinks),
                 std::move(alibi_slopes),
                 std::move(codebook),
                 std::move(key_token_scales),
                 std::move(value_token_scales),
                 std::move(q_sources),
                 std::move(value_bias)});
}

template <AttnResults (*attend)(const AttnArguments&)>
Tensor attn_with_kvcache_out(Tensor q, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches,
                             std::optional<Tensor> key_weights, std::optional<Tensor> value_weights,
                             Tensor cache_seqlens, std::optional<Tensor> block_table, double softmax_scale,
                             int64_t window_left, int64_t window_right, std::optional<Tensor> schedule,
                             bool batch_invariant, std::optional<Tensor> cu_seqlens_q, int64_t max_seqlen_q,
                             double softcap, std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                             Tensor out, std::optional<Tensor> workspace, std::optional<Tensor> codebook,
                             std::optional<std::vector<Tensor>> key_token_scales,
                             std::optional<std::vector<Tensor>> value_token_scales,
                             std::optional<Tensor> q_sources, std::optional<Tensor> value_bias) {
  return std::get<1>(attend({std::move(q),
                             std::move(key_caches),
                             std::move(value_caches),
                             std::move(key_weights),
                             std::move(value_weights),
                             std::move(cache_seqlens),
                             std::move(block_table),
                             softmax_scale,
                             window_left,
                             window_right,
                             std::move(schedule),
                             batch_invariant,
                             std::move(cu_seqlens_q),
                             max_seqlen_q,
                             softcap,
                             std::move(sinks),
                             std::move(alibi_slopes),
                             std::move(codebook),
                             std::move(key_token_scales),
                             std::move(value_token_scales),
                             std::move(q_sources),
                             std::move(value_bias),
                             std::move(out),
                             std::move(workspace)}));
}

// All caches of one side: same shape and dtype as the first, which has codes or the dtype of q. Returns how
// they store elements.
inline CacheCode set_caches(const std::vector<Tensor>& caches, const char* name, const Tensor& q,
                            CacheTensor* out, bool cuda) {
  check_count(caches.size(), name);
  const CacheCode code = code_of(caches[0]);
  for (size_t j = 0; j < caches.size(); ++j) {
    const Tensor& x = caches[j];
    const Name own = name_of(name, j);
    check_device(x, own, cuda);
    check_rank4(x, own, "(B, capacity, G, D), or (P, page_size, G, D) with a block_table");
    check_same_shape(x, own, caches[0], name_of(name, 0));
    if (code == CacheCode::raw)
      check_same_dtype(x, own, q, "q");
    else
      check_same_dtype(x, own, caches[0], name_of(name, 0));
    out[j] = {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  }
  return code;
}

// Queries (1, total_q, H, D) of sequences of different lengths.
inline void set_packed_queries(AttnDecodeParams& p, const Tensor& q, const Tensor& cu_seqlens_q,
                               int64_t max_seqlen_q, bool cuda) {
  check_value(q.size(0) == 1, "q must be (1, total_q, H, D) with cu_seqlens_q, got ", Shape{q});
  check_int32(cu_seqlens_q, "cu_seqlens_q", 1, cuda);
  check_value(cu_seqlens_q.size(0) >= 1, "cu_seqlens_q must have B + 1 entries, got 0");
  check_value(max_seqlen_q >= 0, "max_seqlen_q must be at least 0, got ", max_seqlen_q);
  p.B = cu_seqlens_q.size(0) - 1;
  p.S = p.total_q == 0 ? 0 : max_seqlen_q;
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
}

// The shapes and the tensors that are read.
inline AttnDecodeParams attn_params(const AttnArguments& x, bool cuda) {
  const Tensor& q = x.q;
  const std::vector<Tensor>&keys = x.key_caches, &values = x.value_caches;
  check_device(q, "q", cuda);
  check_rank4(q, "q", "(B, S, H, D)");
  AttnDecodeParams p{};
  p.dtype = dtype_of(q, "q");
  check_type(p.dtype != DType::f64, "q must be float32, bfloat16 or float16, got float64");
  p.key_code = set_caches(keys, "key_caches", q, p.keys, cuda);
  p.value_code = set_caches(values, "value_caches", q, p.values, cuda);
  p.B = q.size(0);
  p.S = q.size(1);
  p.total_q = p.B * p.S;
  if (x.cu_seqlens_q) set_packed_queries(p, q, *x.cu_seqlens_q, x.max_seqlen_q, cuda);
  p.H = q.size(2);
  p.D = q.size(3);
  p.G = keys[0].size(2);
  p.Dv = channels_of(values[0], p.value_code);
  p.num_keys = int(keys.size());
  p.num_values = int(values.size());
  // A call without rows only checks its arguments; it may have any head dim.
  const auto check_channels = p.S == 0 ? check_has_channels : check_head_dim;
  check_channels(p.D, "q");
  check_value(channels_of(keys[0], p.key_code) == p.D, "key_caches[0] must have head dim ", p.D,
              p.key_code == CacheCode::i4 ? " / 2 (two codes per byte)" : " as q", ", got ", Shape{keys[0]});
  check_channels(p.Dv, "value_caches[0]");
  check_value(p.G >= 1 && p.H >= 1 && p.H % p.G == 0, "q must have a multiple of key_caches[0]'s ", p.G,
              " heads, got ", p.H);
  for (int64_t i = 0; i < 3; ++i)
    check_value(values[0].size(i) == keys[0].size(i),
                "value_caches[0] must have the shape of key_caches[0] up to the head dim, ", Shape{keys[0]},
                ", got ", Shape{values[0]});
  if (x.key_weights) {
    check_weights(*x.key_weights, "key_weights", p.num_keys, p.G, p.D, false, cuda);
    p.key_weights = static_cast<const float*>(x.key_weights->const_data_ptr());
  }
  if (x.value_weights) {
    check_weights(*x.value_weights, "value_weights", p.num_values, p.G, p.Dv, false, cuda);
    p.value_weights = static_cast<const float*>(x.value_weights->const_data_ptr());
  }
  p.q = q.const_data_ptr();
  p.q_stride_b = x.cu_seqlens_q ? 0 : q.stride(0);
  p.q_stride_s = q.stride(1);
  p.q_stride_h = q.stride(2);
  return p;
}

// The arguments of a call that are not data.
inline void set_options(AttnDecodeParams& p, const CacheLayout& layout, const AttnArguments& x) {
  p.seq_lens = layout.seq_lens;
  p.block_table = layout.block_table;
  p.block_table_stride = layout.block_table_stride;
  p.page_size = layout.page_size;
  p.scale = float(x.softmax_scale);
  // Lengths are int32: a larger window is unbounded. Positions plus a window then cannot overflow.
  const auto window = [](int64_t size) { return size < INT32_MAX ? size : -1; };
  p.window_left = window(x.window_left);
  p.window_right = window(x.window_right);
}

// One float per query head: (H,), or (B, H) where allowed.
inline const float* per_head(const AttnDecodeParams& p, const Tensor& x, const char* name, bool per_sequence,
                             bool cuda) {
  check_device(x, name, cuda);
  check_type(x.scalar_type() == ScalarType::Float, name, " must be float32, got ", DTypeOf{x},
             "; convert it with .float()");
  const bool of_heads = x.dim() == 1 && x.size(0) == p.H;
  const bool of_sequences = per_sequence && x.dim() == 2 && x.size(0) == p.B && x.size(1) == p.H;
  if (per_sequence)
    check_value(of_heads || of_sequences, name, " must have shape (H,) = (", p.H, ",) or (B, H) = (", p.B,
                ", ", p.H, "), got ", Shape{x});
  check_value(of_heads || of_sequences, name, " must have shape (H,) = (", p.H, ",), got ", Shape{x});
  check_value(x.is_contiguous(), name, " must be contiguous; call .contiguous()");
  return static_cast<const float*>(x.const_data_ptr());
}

// What is done to scores, and to their sum.
inline void set_scores(AttnDecodeParams& p, const AttnArguments& x, bool cuda) {
  p.softcap = float(x.softcap);
  check_value(x.softcap == 0 || (p.softcap >= FLT_MIN && p.softcap <= FLT_MAX),
              "softcap must be 0.0 (off) or a positive float32, got ", x.softcap);
  p.inverse_softcap = x.softcap == 0 ? 0.f : 1.f / p.softcap;
  if (x.sinks) p.sinks = per_head(p, *x.sinks, "sinks", false, cuda);
  if (!x.alibi_slopes) return;
  p.alibi_slopes = per_head(p, *x.alibi_slopes, "alibi_slopes", true, cuda);
  p.alibi_stride_b = x.alibi_slopes->dim() == 2 ? p.H : 0;
}

// The factors of a call's tokens, one tensor per source.
struct TokenScales {
  std::vector<CacheTensor> keys, values;
};

// One float16 tensor (B, capacity, G) or (P, page_size, G) for each cache of a side.
inline const CacheTensor* token_scales(const std::optional<std::vector<Tensor>>& scales, const char* name,
                                       const std::vector<Tensor>& caches, bool cuda,
                                       std::vector<CacheTensor>* out) {
  if (!scales) return nullptr;
  check_value(scales->size() == caches.size(), name, " must hold ", caches.size(),
              " tensors, one per cache, got ", scales->size());
  for (size_t j = 0; j < scales->size(); ++j) {
    const Tensor &x = (*scales)[j], &cache = caches[j];
    const Name own = name_of(name, j);
    check_device(x, own, cuda);
    check_type(x.scalar_type() == ScalarType::Half, own, " must be float16, got ", DTypeOf{x},
               "; convert it with .half()");
    check_value(x.dim() == 3 && x.size(0) == cache.size(0) && x.size(1) == cache.size(1) &&
                    x.size(2) == cache.size(2),
                own, " must have the first three dims of its cache, ", Shape{cache}, ", got ", Shape{x});
    out->push_back({x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)});
  }
  return out->data();
}

// What belongs to codes: their numbers, factors of tokens, a query per source, a bias of the values.
inline void set_codes(AttnDecodeParams& p, const AttnArguments& x, bool cuda, TokenScales* scales) {
  const auto floats = [&](const Tensor& t, const char* name) {
    check_device(t, name, cuda);
    check_type(t.scalar_type() == ScalarType::Float, name, " must be float32, got ", DTypeOf{t},
               "; convert it with .float()");
    check_value(t.is_contiguous(), name, " must be contiguous; call .contiguous()");
    return static_cast<const float*>(t.const_data_ptr());
  };
  if (x.codebook) {
    check_value(p.key_code == CacheCode::i4 || p.value_code == CacheCode::i4,
                "codebook must be None without uint8 caches of 4-bit codes, got a tensor");
    p.codebook = floats(*x.codebook, "codebook");
    check_value(x.codebook->dim() == 1 && x.codebook->size(0) == kCodebook, "codebook must have shape (",
                kCodebook, ",), got ", Shape{*x.codebook});
  }
  p.key_scales = token_scales(x.key_token_scales, "key_token_scales", x.key_caches, cuda, &scales->keys);
  p.value_scales =
      token_scales(x.value_token_scales, "value_token_scales", x.value_caches, cuda, &scales->values);
  if (x.value_bias) {
    const Tensor& bias = *x.value_bias;
    p.value_bias = floats(bias, "value_bias");
    check_value(bias.dim() == 2 && bias.size(0) == p.G && bias.size(1) == p.Dv,
                "value_bias must have shape (G, Dv) = (", p.G, ", ", p.Dv, "), got ", Shape{bias});
  }
  if (!x.q_sources) return;
  const Tensor &q = *x.q_sources, &first = x.q;
  check_device(q, "q_sources", cuda);
  check_same_dtype(q, "q_sources", first, "q");
  bool same = q.dim() == 5 && q.size(0) == p.num_keys;
  for (int64_t i = 0; same && i < 4; ++i) same = q.size(i + 1) == first.size(i);
  check_value(same, "q_sources must have shape (", p.num_keys,
              ", B, S, H, D), a query of q's shape for each of key_caches, got ", Shape{q});
  check_value(q.size(4) <= 1 || q.numel() == 0 || q.stride(4) == 1,
              "q_sources must have stride 1 in its last dim, got ", q.stride(4), "; call .contiguous()");
  p.q = q.const_data_ptr();
  p.q_stride_source = q.stride(0);
  p.q_stride_b = x.cu_seqlens_q ? 0 : q.stride(1);
  p.q_stride_s = q.stride(2);
  p.q_stride_h = q.stride(3);
}

// CUDA kernels store 16 bytes at a time.
inline void check_aligned(const Tensor& x, const char* name) {
  check_value(x.numel() == 0 || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name,
              " must begin at a multiple of 16 bytes, got a slice that does not; call .clone()");
}

// The memory for partial results that the caller owns, of at least `floats` elements.
inline float* caller_workspace(const Tensor& x, int64_t floats, bool cuda) {
  check_device(x, "workspace", cuda);
  check_type(x.scalar_type() == ScalarType::Float, "workspace must be float32, got ", DTypeOf{x});
  check_value(x.dim() == 1 && x.is_contiguous() && x.size(0) >= floats,
              "workspace must be contiguous of shape (N,) with N >= ", floats, ", got ", Shape{x});
  check_aligned(x, "workspace");
  return static_cast<float*>(x.mutable_data_ptr());
}

// New results, or those of the caller: the last step before they are written. Writes p.out and p.lse.
inline AttnResults begin_results(AttnDecodeParams& p, const AttnArguments& x, bool cuda) {
  const Tensor& q = x.q;
  Tensor lse = empty_tensor(q, {q.size(0), p.H, q.size(1)}, aoti_torch_dtype_float32());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (!x.out) {
    Tensor out = empty_tensor(q, {q.size(0), q.size(1), p.H, p.Dv}, dtype_code(q));
    p.out = out.mutable_data_ptr();
    return {out, lse};
  }
  const Tensor& out = *x.out;
  check_device(out, "out", cuda);
  check_same_dtype(out, "out", q, "q");
  check_value(out.dim() == 4 && out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == p.H &&
                  out.size(3) == p.Dv && out.is_contiguous(),
              "out must be contiguous of shape (", q.size(0), ", ", q.size(1), ", ", p.H, ", ", p.Dv,
              "), got ", Shape{out});
  check_aligned(out, "out");
  const Extent written(out, "out");
  x.for_each_input([&](const Tensor& read, Name name) { check_apart(written, Extent(read, name)); });
  if (x.workspace) {
    const Extent workspace(*x.workspace, "workspace");
    check_apart(written, workspace);
    x.for_each_input([&](const Tensor& read, Name name) { check_apart(workspace, Extent(read, name)); });
    count_write(*x.workspace, "workspace");
  }
  count_write(out, "out");
  p.out = out.mutable_data_ptr();
  return {out, lse};
}

}  // namespace fusedkv::api
