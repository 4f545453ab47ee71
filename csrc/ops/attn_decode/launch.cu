// Launches the decode kernel that attn_launch has selected, on a grid that fills the GPU once.

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/gpu.cuh"
#include "ops/attn_decode/kernels.h"

namespace fusedkv {

namespace {

template <typename T, int kD>
AttnKernelFunction mma_kernel(const AttnDecodeParams& p, const AttnLaunch& l) {
  if (l.kernel == AttnKernel::kMmaWarp) return attn_mma_warp_kernel<T, kD>(p.num_keys, p.num_values);
  return p.num_keys == 2 ? attn_mma_block_kernel<T, kD, 2>(p.num_values, l.rows)
                         : attn_mma_block_kernel<T, kD, 1>(p.num_values, l.rows);
}

template <typename T>
AttnKernelFunction mma_kernel(const AttnDecodeParams& p, const AttnLaunch& l) {
  return l.head_dim == 64    ? mma_kernel<T, 64>(p, l)
         : l.head_dim == 128 ? mma_kernel<T, 128>(p, l)
                             : mma_kernel<T, 256>(p, l);
}

AttnKernelFunction kernel_function(const AttnDecodeParams& p, const AttnLaunch& l) {
  if (l.kernel == AttnKernel::kFallback) return attn_fallback_kernel(p.dtype, l.head_dim);
  return p.dtype == DType::bf16 ? mma_kernel<bf16>(p, l) : mma_kernel<f16>(p, l);
}

template <typename T>
AttnCodedKernelFunction coded_kernel(const AttnLaunch& l) {
  return l.head_dim == 64    ? attn_coded_kernel<T, 64>()
         : l.head_dim == 128 ? attn_coded_kernel<T, 128>()
                             : attn_coded_kernel<T, 256>();
}

AttnCodedKernelFunction coded_kernel_function(const AttnDecodeParams& p, const AttnLaunch& l) {
  return p.dtype == DType::f32    ? coded_kernel<float>(l)
         : p.dtype == DType::bf16 ? coded_kernel<bf16>(l)
                                  : coded_kernel<f16>(l);
}

// Blocks of a kernel per SM. What the kernel is permitted and its occupancy take microseconds to set and to
// query. Decoding would repeat it for every layer.
template <typename Kernel>
int known_blocks_per_sm(Kernel kernel, const DeviceLimits& limits, const AttnLaunch& l, int* blocks) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& per_sm = known[{kernel, limits.device, l.shared_bytes}];
  if (per_sm == 0) {
    if (int error = allow_shared(kernel, limits)) return error;
    if (int error = blocks_per_sm(&per_sm, kernel, l.threads, size_t(l.shared_bytes))) return error;
  }
  *blocks = per_sm;
  return 0;
}

}  // namespace

int attn_shared_limit(int* bytes) {
  DeviceLimits limits;
  const int error = device_limits(&limits);
  *bytes = limits.shared_per_block;
  return error;
}

int attn_blocks(const AttnDecodeParams& p, const AttnLaunch& l, int* blocks) {
  DeviceLimits limits;
  if (int error = device_limits(&limits)) return error;
  int per_sm = 0;
  const int error = l.kernel == AttnKernel::kCoded
                        ? known_blocks_per_sm(coded_kernel_function(p, l), limits, l, &per_sm)
                        : known_blocks_per_sm(kernel_function(p, l), limits, l, &per_sm);
  if (error) return error;
  *blocks = grid_blocks(limits.sm_count, per_sm);
  return 0;
}

int attn_decode_cuda(const AttnCodedParams& p, const AttnLaunch& l, int blocks, void* stream) {
  const dim3 grid{unsigned(blocks)}, block{unsigned(l.threads)};
  const auto bytes = size_t(l.shared_bytes);
  if (l.kernel == AttnKernel::kCoded)
    return launch_overlapped(coded_kernel_function(p.attn, l), grid, block, bytes, stream, p);
  const AttnCudaParams& raw = p;
  return launch_overlapped(kernel_function(p.attn, l), grid, block, bytes, stream, raw);
}

}  // namespace fusedkv
