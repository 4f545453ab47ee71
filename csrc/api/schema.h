// The schemas of all ops, the same for every backend. fusedkv_ext/ops/functional.py, the interface for users,
// documents shapes and dtypes.
#pragma once

namespace fusedkv::api {

template <typename Library>
void define_ops(Library& m) {
  m.def("fuse_kv(Tensor[] sources, Tensor weights) -> Tensor");
  m.def(
      "fuse_kv_pair(Tensor[] keys, Tensor key_weights, Tensor[] values, Tensor value_weights)"
      " -> (Tensor, Tensor)");
  m.def(
      "fuse_kv_backward(Tensor grad, Tensor[] sources, Tensor weights, bool needs_sources, bool "
      "needs_weights)"
      " -> (Tensor, Tensor)");
  m.def(
      "fuse_kv_backward_accumulate(Tensor grad, Tensor[] sources, Tensor weights, Tensor(a!)[] grad_sources,"
      " bool needs_weights) -> Tensor");
  m.def(
      "fuse_kvcache(Tensor[] caches, Tensor weights, Tensor cache_seqlens, Tensor? block_table,"
      " SymInt tokens) -> Tensor");
  m.def(
      "attn_with_kvcache(Tensor q, Tensor[] key_caches, Tensor[] value_caches, Tensor? key_weights,"
      " Tensor? value_weights, Tensor cache_seqlens, Tensor? block_table, float softmax_scale,"
      " int window_left, int window_right, Tensor? schedule, bool batch_invariant,"
      " Tensor? cu_seqlens_q=None, SymInt max_seqlen_q=0, float softcap=0.0, Tensor? sinks=None,"
      " Tensor? alibi_slopes=None,"
      " Tensor? codebook=None, Tensor[]? key_token_scales=None, Tensor[]? value_token_scales=None,"
      " Tensor? q_sources=None, Tensor? value_bias=None) -> (Tensor, Tensor)");
  m.def(
      "attn_with_kvcache_out(Tensor q, Tensor[] key_caches, Tensor[] value_caches, Tensor? key_weights,"
      " Tensor? value_weights, Tensor cache_seqlens, Tensor? block_table, float softmax_scale,"
      " int window_left, int window_right, Tensor? schedule, bool batch_invariant, Tensor? cu_seqlens_q,"
      " SymInt max_seqlen_q, float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor(a!) out,"
      " Tensor(b!)? workspace=None,"
      " Tensor? codebook=None, Tensor[]? key_token_scales=None, Tensor[]? value_token_scales=None,"
      " Tensor? q_sources=None, Tensor? value_bias=None) -> Tensor");
  m.def(
      "attn_schedule(Tensor cache_seqlens, SymInt query_length, int num_heads, int num_kv_heads,"
      " SymInt capacity, int window_left, bool batch_invariant) -> Tensor");
  m.def(
      "append_kvcache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
      " Tensor cache_seqlens, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin,"
      " bool rotary_interleaved, Tensor? query, Tensor? key_scale=None, Tensor? key_center=None,"
      " Tensor? value_scale=None, Tensor? value_center=None) -> Tensor");
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
}

}  // namespace fusedkv::api
