// The fuse_kv family on the CPU.

#include "api/fuse_kv.h"

#include "common/kept_memory.h"
#include "cpu/simd_targets.h"

namespace fusedkv::api {

namespace {

// Minimum bytes per thread: less is not worth waking one.
constexpr int64_t kGrainBytes = 64 * 1024;

// Results of at least this size use non-temporal stores. They would not fit the CPU's caches, and lines that
// are not read before they are written save a third of the traffic.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape) {
  int64_t bytes = int64_t(like.element_size());
  for (int64_t size : shape) bytes *= size;
  if (bytes < kLargeBytes) return new_tensor(like, shape);
  const MemoryBlock block = take_memory(bytes);
  if (block.data == nullptr) return new_tensor(like, shape);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * shape[i + 1];
  return torch::stable::from_blob(block.data, shape, strides, like.device(), like.scalar_type(),
                                  [block](void*) { give_back_memory(block); });
}

Tensor forward(FuseKVParams& p, const Tensor& like) {
  Tensor out = fused_output(p, like, new_result);
  p.stream = out.numel() * size_of(p.dtype) >= kStreamBytes;
  const int64_t bytes = (p.m + 1) * p.G * p.D * size_of(p.dtype);
  const int64_t grain = bytes ? (kGrainBytes + bytes - 1) / bytes : 1;
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, p.B * p.T, grain,
                              [&](int64_t begin, int64_t end) { kernels.fuse_kv_forward(p, begin, end); });
  return out;
}

void backward(const FuseKVParams& p) {
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, num_chunks(p), 1,
                              [&](int64_t begin, int64_t end) { kernels.fuse_kv_backward(p, begin, end); });
  if (p.grad_weights == nullptr) return;
  torch::stable::parallel_for(
      0, p.m * p.G * p.D / 8, kGrainBytes / (32 * (num_chunks(p) + 1)) + 1,
      [&](int64_t begin, int64_t end) { kernels.fuse_kv_reduce_weights(p, begin, end); });
}

Tensor fuse_kv(std::vector<Tensor> sources, Tensor weights) {
  FuseKVParams p = fuse_kv_params(sources, "sources", weights, "weights", false);
  return forward(p, sources[0]);
}

std::tuple<Tensor, Tensor> fuse_kv_pair(std::vector<Tensor> keys, Tensor key_weights,
                                        std::vector<Tensor> values, Tensor value_weights) {
  FuseKVParams k = fuse_kv_params(keys, "keys", key_weights, "key_weights", false);
  FuseKVParams v = fuse_kv_params(values, "values", value_weights, "value_weights", false);
  check_pair(keys, values);
  return {forward(k, keys[0]), forward(v, values[0])};
}

Tensor fuse_kvcache(std::vector<Tensor> caches, Tensor weights, Tensor cache_seqlens,
                    std::optional<Tensor> block_table, int64_t tokens) {
  CacheLayout layout;
  FuseKVParams p = fuse_kvcache_params(caches, weights, cache_seqlens, block_table, tokens, false, &layout);
  for (int64_t b = 0; b < p.B; ++b) {
    check_length(layout, b);
    const int64_t len = p.seq_lens[b];
    check_pages(layout, b, len > tokens ? len - tokens : 0, len);
  }
  return forward(p, caches[0]);
}

std::tuple<Tensor, Tensor> fuse_kv_backward(Tensor grad, std::vector<Tensor> sources, Tensor weights,
                                            bool needs_sources, bool needs_weights) {
  FuseKVParams p = fuse_kv_backward_params(grad, sources, weights, false);
  Tensor grad_sources = needs_sources ? new_source_gradients(p, grad, new_result) : new_tensor(grad, {0});
  p.stream = grad_sources.numel() * size_of(p.dtype) >= kStreamBytes;
  const auto [grad_weights, partial] = new_weight_gradients(p, weights, needs_weights);
  backward(p);
  return {grad_sources, grad_weights};
}

Tensor fuse_kv_backward_accumulate(Tensor grad, std::vector<Tensor> sources, Tensor weights,
                                   std::vector<Tensor> grad_sources, bool needs_weights) {
  FuseKVParams p = fuse_kv_backward_params(grad, sources, weights, false);
  set_source_gradients(p, grad_sources, sources, false);
  begin_writes(grad_sources, grad, sources, weights, needs_weights);
  const auto [grad_weights, partial] = new_weight_gradients(p, weights, needs_weights);
  backward(p);
  return grad_weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("fuse_kv", TORCH_BOX(&fuse_kv));
  m.impl("fuse_kv_pair", TORCH_BOX(&fuse_kv_pair));
  m.impl("fuse_kvcache", TORCH_BOX(&fuse_kvcache));
  m.impl("fuse_kv_backward", TORCH_BOX(&fuse_kv_backward));
  m.impl("fuse_kv_backward_accumulate", TORCH_BOX(&fuse_kv_backward_accumulate));
}

}  // namespace fusedkv::api
