// The fuse_kv family on the GPU.

#include "api/fuse_kv.h"

#include "api/device.h"

namespace fusedkv::api {

namespace {

// The kernels read 16 bytes at a time.
bool aligned16(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

bool aligned16(const TokenTensor& x, DType dtype) {
  const int64_t per_piece = 16 / size_of(dtype);
  return aligned16(x.data) && x.stride_b % per_piece == 0 && x.stride_t % per_piece == 0 &&
         x.stride_g % per_piece == 0;
}

Tensor copied(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::clone(x));
}

// Copies inputs that are not aligned, and registers all inputs with the scope.
void prepare(FuseKVParams& p, std::vector<Tensor>& sources, const char* name, Tensor& weights,
             const char* weights_name, const Tensor& first, const DeviceScope& scope) {
  check_value(p.B <= INT32_MAX && p.T <= INT32_MAX, name_of(name, 0), " must have B and T below 2^31, got ",
              Shape{sources[0]});
  check_same_gpu(weights, weights_name, first, name);
  for (int j = 0; j < p.m; ++j) {
    check_same_gpu(sources[j], name_of(name, j), first, name);
    if (!aligned16(p.sources[j], p.dtype)) {
      sources[j] = copied(sources[j]);
      p.sources[j] = token_tensor(sources[j]);
    }
  }
  if (!aligned16(p.weights)) {
    weights = copied(weights);
    p.weights = weights.const_data_ptr();
  }
  uses(scope, sources, name);
  scope.uses(weights, weights_name);
}

Tensor fuse_kv(std::vector<Tensor> sources, Tensor weights) {
  FuseKVParams p = fuse_kv_params(sources, "sources", weights, "weights", kCuda);
  const DeviceScope scope(sources[0]);
  prepare(p, sources, "sources", weights, "weights", sources[0], scope);
  Tensor out = fused_output(p, sources[0]);
  scope.makes(out, "the output");
  check_launch(fuse_kv_forward_cuda(&p, 1, scope.stream()), "fuse_kv");
  return out;
}

std::tuple<Tensor, Tensor> fuse_kv_pair(std::vector<Tensor> keys, Tensor key_weights,
                                        std::vector<Tensor> values, Tensor value_weights) {
  FuseKVParams p[2] = {fuse_kv_params(keys, "keys", key_weights, "key_weights", kCuda),
                       fuse_kv_params(values, "values", value_weights, "value_weights", kCuda)};
  check_pair(keys, values);
  const DeviceScope scope(keys[0]);
  prepare(p[0], keys, "keys", key_weights, "key_weights", keys[0], scope);
  prepare(p[1], values, "values", value_weights, "value_weights", keys[0], scope);
  Tensor k = fused_output(p[0], keys[0]), v = fused_output(p[1], values[0]);
  scope.makes(k, "the keys");
  scope.makes(v, "the values");
  check_launch(fuse_kv_forward_cuda(p, 2, scope.stream()), "fuse_kv_pair");
  return {k, v};
}

Tensor fuse_kvcache(std::vector<Tensor> caches, Tensor weights, Tensor cache_seqlens,
                    std::optional<Tensor> block_table, int64_t tokens) {
  CacheLayout layout;
  FuseKVParams p = fuse_kvcache_params(caches, weights, cache_seqlens, block_table, tokens, kCuda, &layout);
  const DeviceScope scope(caches[0]);
  prepare(p, caches, "caches", weights, "weights", caches[0], scope);
  check_same_gpu(cache_seqlens, "cache_seqlens", caches[0], "caches");
  if (block_table) check_same_gpu(*block_table, "block_table", caches[0], "caches");
  scope.uses(cache_seqlens, "cache_seqlens");
  uses(scope, block_table, "block_table");
  Tensor out = fused_output(p, caches[0]);
  scope.makes(out, "the output");
  check_launch(fuse_kv_forward_cuda(&p, 1, scope.stream()), "fuse_kvcache");
  return out;
}

// The common part of both backward ops after p.grad_sources is set. Returns the gradient of the weights.
Tensor backward(FuseKVParams& p, Tensor grad, std::vector<Tensor> sources, Tensor weights, bool needs_weights,
                const DeviceScope& scope) {
  prepare(p, sources, "sources", weights, "weights", grad, scope);
  check_same_gpu(grad, "grad", sources[0], "sources");
  if (!aligned16(p.grad_out)) {
    grad = copied(grad);
    p.grad_out = grad.const_data_ptr();
  }
  const auto [grad_weights, partial] = new_weight_gradients(p, weights, needs_weights);
  scope.uses(grad, "grad");
  scope.makes(grad_weights, "grad_weights");
  scope.makes(partial, "the partial sums of grad_weights");
  check_launch(fuse_kv_backward_cuda(p, scope.stream()), "fuse_kv_backward");
  return grad_weights;
}

std::tuple<Tensor, Tensor> fuse_kv_backward(Tensor grad, std::vector<Tensor> sources, Tensor weights,
                                            bool needs_sources, bool needs_weights) {
  FuseKVParams p = fuse_kv_backward_params(grad, sources, weights, kCuda);
  const DeviceScope scope(grad);
  Tensor grad_sources = needs_sources ? new_source_gradients(p, grad) : torch::stable::new_empty(grad, {0});
  scope.makes(grad_sources, "grad_sources");
  return {grad_sources, backward(p, grad, sources, weights, needs_weights, scope)};
}

Tensor fuse_kv_backward_accumulate(Tensor grad, std::vector<Tensor> sources, Tensor weights,
                                   std::vector<Tensor> grad_sources, bool needs_weights) {
  FuseKVParams p = fuse_kv_backward_params(grad, sources, weights, kCuda);
  set_source_gradients(p, grad_sources, sources, kCuda);
  const DeviceScope scope(grad);
  for (int j = 0; j < p.m; ++j) {
    check_same_gpu(grad_sources[j], name_of("grad_sources", j), grad, "grad");
    check_value(aligned16(p.grad_sources[j]), name_of("grad_sources", j),
                " must start at a multiple of 16 bytes; call .clone()");
  }
  begin_writes(grad_sources, grad, sources, weights, needs_weights);
  uses(scope, grad_sources, "grad_sources");
  return backward(p, grad, sources, weights, needs_weights, scope);
}

}  // namespace

FUSEDKV_DEVICE_IMPL(m) {
  m.impl("fuse_kv", TORCH_BOX(&fuse_kv));
  m.impl("fuse_kv_pair", TORCH_BOX(&fuse_kv_pair));
  m.impl("fuse_kvcache", TORCH_BOX(&fuse_kvcache));
  m.impl("fuse_kv_backward", TORCH_BOX(&fuse_kv_backward));
  m.impl("fuse_kv_backward_accumulate", TORCH_BOX(&fuse_kv_backward_accumulate));
}

}  // namespace fusedkv::api
