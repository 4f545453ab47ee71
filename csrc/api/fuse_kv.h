// Parameters of the fuse_kv family from their arguments, the same on every backend.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "api/caches.h"
#include "api/writes.h"
#include "ops/fuse_kv/params.h"

namespace fusedkv::api {

inline TokenTensor token_tensor(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline FuseKVParams fuse_kv_params(const std::vector<Tensor>& sources, const char* name,
                                   const Tensor& weights, const char* weights_name, bool cuda,
                                   const char* dims = "(B, T, G, D)") {
  check_count(sources.size(), name);
  const Tensor& first = sources[0];
  const Name first_name = name_of(name, 0);
  FuseKVParams p{};
  p.m = int(sources.size());
  for (int j = 0; j < p.m; ++j) {
    const Tensor& x = sources[j];
    const Name own = name_of(name, j);
    check_device(x, own, cuda);
    check_rank4(x, own, dims);
    check_same_shape(x, own, first, first_name);
    check_same_dtype(x, own, first, first_name);
    p.sources[j] = token_tensor(x);
  }
  p.dtype = dtype_of(first, first_name);
  p.B = first.size(0);
  p.T = first.size(1);
  p.G = first.size(2);
  p.D = first.size(3);
  check_head_dim(p.D, first_name);
  check_weights(weights, weights_name, p.m, p.G, p.D, p.dtype == DType::f64, cuda);
  p.weights = weights.const_data_ptr();
  return p;
}

// Allocates a contiguous tensor with like's dtype and device.
using NewTensor = Tensor (*)(const Tensor& like, const std::vector<int64_t>& shape);

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape);
}

inline Tensor fused_output(FuseKVParams& p, const Tensor& like, NewTensor make = new_tensor) {
  Tensor out = make(like, {p.B, p.T, p.G, p.D});
  p.out = out.mutable_data_ptr();
  return out;
}

// Keys and values of one layer: two sums over the same tokens and heads.
inline void check_pair(const std::vector<Tensor>& keys, const std::vector<Tensor>& values) {
  check_same_dtype(values[0], "values[0]", keys[0], "keys[0]");
  for (int64_t i = 0; i < 3; ++i)
    check_value(values[0].size(i) == keys[0].size(i),
                "values[0] must have the shape of keys[0] up to the head dim, ", Shape{keys[0]}, ", got ",
                Shape{values[0]});
}

// Checks everything but the contents of cache_seqlens and block_table.
inline FuseKVParams fuse_kvcache_params(const std::vector<Tensor>& caches, const Tensor& weights,
                                        const Tensor& cache_seqlens, const std::optional<Tensor>& block_table,
                                        int64_t tokens, bool cuda, CacheLayout* layout) {
  FuseKVParams p = fuse_kv_params(caches, "caches", weights, "weights", cuda,
                                  "(B, capacity, G, D), or (P, page_size, G, D) with a block_table");
  check_type(p.dtype != DType::f64, "caches[0] must be float32, bfloat16 or float16, got float64");
  check_int32(cache_seqlens, "cache_seqlens", 1, cuda);
  p.B = cache_seqlens.size(0);
  *layout = cache_layout(caches[0], "caches[0]", cache_seqlens, block_table, p.B, cuda);
  check_value(tokens >= 0 && tokens < INT32_MAX, "tokens must be at least 0 and below 2^31 - 1, got ",
              tokens);
  p.T = tokens;
  p.seq_lens = layout->seq_lens;
  p.block_table = layout->block_table;
  p.block_table_stride = layout->block_table_stride;
  p.num_pages = layout->num_pages;
  p.page_size = layout->page_size;
  p.capacity = layout->capacity;
  return p;
}

inline FuseKVParams fuse_kv_backward_params(const Tensor& grad, const std::vector<Tensor>& sources,
                                            const Tensor& weights, bool cuda) {
  FuseKVParams p = fuse_kv_params(sources, "sources", weights, "weights", cuda);
  check_device(grad, "grad", cuda);
  check_same_shape(grad, "grad", sources[0], "sources[0]");
  check_same_dtype(grad, "grad", sources[0], "sources[0]");
  check_value(grad.is_contiguous(), "grad must be contiguous; call .contiguous()");
  p.grad_out = grad.const_data_ptr();
  p.grad_dtype = p.dtype;
  return p;
}

// New gradients of the sources, (m, B, T, G, D).
inline Tensor new_source_gradients(FuseKVParams& p, const Tensor& grad, NewTensor make = new_tensor) {
  Tensor grads = make(grad, {p.m, p.B, p.T, p.G, p.D});
  char* data = static_cast<char*>(grads.mutable_data_ptr());
  for (int j = 0; j < p.m; ++j) p.grad_sources[j] = data + j * grad.numel() * size_of(p.dtype);
  return grads;
}

// Buffers that the gradients of the sources are added to.
inline void set_source_gradients(FuseKVParams& p, const std::vector<Tensor>& grads,
                                 const std::vector<Tensor>& sources, bool cuda) {
  check_value(int(grads.size()) == p.m, "grad_sources must hold ", p.m, " tensors, one per source, got ",
              grads.size());
  p.accumulate = true;
  p.grad_dtype = dtype_of(grads[0], "grad_sources[0]");
  check_type(p.grad_dtype == p.dtype || (p.grad_dtype == DType::f32 && p.dtype != DType::f64),
             "grad_sources[0] must be float32 or have the dtype of sources[0], got ", DTypeOf{grads[0]});
  for (int j = 0; j < p.m; ++j) {
    const Tensor& x = grads[j];
    const Name own = name_of("grad_sources", j);
    check_device(x, own, cuda);
    check_same_shape(x, own, sources[0], "sources[0]");
    check_same_dtype(x, own, grads[0], "grad_sources[0]");
    check_value(x.is_contiguous(), own, " must be contiguous; call .contiguous()");
    p.grad_sources[j] = x.mutable_data_ptr();
  }
}

// The last step before gradients are added to the buffers. A buffer may not overlap another one or an input:
// the result would depend on the order of writes. Buffer j may be source j itself: kernels read an element
// before they write it.
inline void begin_writes(const std::vector<Tensor>& grad_sources, const Tensor& grad,
                         const std::vector<Tensor>& sources, const Tensor& weights, bool reads_sources) {
  const Extent of_grad(grad, "grad"), of_weights(weights, "weights");
  std::vector<Extent> written, read;
  for (size_t j = 0; j < sources.size(); ++j) {
    written.emplace_back(grad_sources[j], name_of("grad_sources", j));
    read.emplace_back(sources[j], name_of("sources", j));
  }
  for (size_t j = 0; j < written.size(); ++j) {
    for (size_t i = 0; i < j; ++i) check_apart(written[i], written[j]);
    check_apart(written[j], of_grad);
    check_apart(written[j], of_weights);
    for (size_t i = 0; reads_sources && i < read.size(); ++i)
      if (i != j || !written[j].is(read[j])) check_apart(written[j], read[i]);
  }
  for (size_t j = 0; j < written.size(); ++j) count_write(grad_sources[j], written[j].name);
}

// (the gradient of the weights, its partial sums).
inline std::tuple<Tensor, Tensor> new_weight_gradients(FuseKVParams& p, const Tensor& weights, bool wanted) {
  Tensor grads = torch::stable::new_empty(weights, {wanted ? p.m : 0, p.G, p.D});
  Tensor partial = torch::stable::new_empty(weights, {wanted ? num_chunks(p) : 0, p.m, p.G, p.D});
  p.grad_weights = wanted ? grads.mutable_data_ptr() : nullptr;
  p.partial_weights = wanted ? partial.mutable_data_ptr() : nullptr;
  return {grads, partial};
}

}  // namespace fusedkv::api
