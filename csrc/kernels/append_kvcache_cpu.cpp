// cache[pos] = new[s] with pos = len - S + s; a key's rotated pair (x0, x1) becomes (x0 cos - x1 sin, x1 cos
// + x0 sin) in fp32.

#include "kernels/append_kvcache.h"

#include "kernels/cpu_simd.h"

namespace fusedkv {
namespace FUSEDKV_LEVEL {

namespace {

template <typename T>
void rotate_into(T* out, const T* x, const float* cos, const float* sin, int64_t rotary_dim,
                 bool interleaved) {
  const int64_t half = rotary_dim / 2;
  for (int64_t j = 0; j < half; ++j) {
    const int64_t i0 = interleaved ? 2 * j : j, i1 = interleaved ? 2 * j + 1 : j + half;
    const auto x0 = widen(x[i0]), x1 = widen(x[i1]);
    narrow(x0 * cos[j] - x1 * sin[j], out + i0);
    narrow(x1 * cos[j] + x0 * sin[j], out + i1);
  }
}

template <typename T>
void append(const AppendKVCacheParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.S, s = token % p.S;
    const int64_t pos = p.seq_lens[b] - p.S + s;
    if (pos < 0) continue;
    const int64_t row = p.block_table ? p.block_table[b * p.block_table_stride + pos / p.page_size] : b;
    const int64_t slot = p.block_table ? pos % p.page_size : pos;
    const auto source = [&](const AppendTensor& x, int64_t g) {
      return (const T*)x.src + b * x.src_stride_b + s * x.src_stride_s + g * x.src_stride_g;
    };
    const auto target = [&](const AppendTensor& x, int64_t g) {
      return (T*)x.cache + row * x.cache_stride_b + slot * x.cache_stride_t + g * x.cache_stride_g;
    };
    const int64_t rotated = p.cos ? p.rotary_dim : 0;
    for (int64_t g = 0; g < p.key.G; ++g) {
      const T* x = source(p.key, g);
      T* out = target(p.key, g);
      if (rotated)
        rotate_into(out, x, p.cos + pos * rotated / 2, p.sin + pos * rotated / 2, rotated, p.interleaved);
      __builtin_memcpy(out + rotated, x + rotated, size_t(p.key.D - rotated) * sizeof(T));
    }
    for (int64_t g = 0; g < p.value.G; ++g)
      __builtin_memcpy(target(p.value, g), source(p.value, g), size_t(p.value.D) * sizeof(T));
  }
}

}  // namespace

void append_kvcache(const AppendKVCacheParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) { append<typename decltype(tag)::type>(p, begin, end); });
}

}  // namespace FUSEDKV_LEVEL
}  // namespace fusedkv
