// The schemas of all ops, once for every backend. Shapes and dtypes: fusedkv_ext/ops.py, which is what users
// call.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fusedkv, m) {
  m.def("fuse_kv(Tensor[] sources, Tensor weights) -> Tensor");
  m.def(
      "fuse_kv_backward(Tensor grad, Tensor[] sources, Tensor weights, bool needs_sources, bool "
      "needs_weights)"
      " -> (Tensor, Tensor)");
  m.def(
      "attn_with_kvcache(Tensor q, Tensor[] key_caches, Tensor[] value_caches, Tensor? key_weights, Tensor? "
      "value_weights,"
      " Tensor cache_seqlens, Tensor? block_table, float softmax_scale, int window_left, int window_right)"
      " -> (Tensor, Tensor)");
  m.def(
      "append_kvcache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor "
      "cache_seqlens,"
      " Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved) -> ()");
}
