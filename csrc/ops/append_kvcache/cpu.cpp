// cache[pos] = new[s] with pos = len - S + s;    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)
//
// The rotation of pairs of channels of keys and queries is computed in fp32. Queries at pos < 0 are not
// rotated.

#include "ops/append_kvcache/params.h"

#include "cpu/simd.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

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

// Copies all heads of token s of sequence b to row `row`, slot `slot`. Rotates the first `rotated` channels
// by table row `pos`.
template <typename T>
void move_token(const AppendKVCacheParams& p, const AppendTensor& x, int64_t b, int64_t s, int64_t row,
                int64_t slot, int64_t pos, int64_t rotated) {
  for (int64_t g = 0; g < x.heads; ++g) {
    const T* from = (const T*)x.src + b * x.src_stride_b + s * x.src_stride_s + g * x.src_stride_g;
    T* to = (T*)x.dst + row * x.dst_stride_b + slot * x.dst_stride_t + g * x.dst_stride_g;
    if (rotated)
      rotate_into(to, from, p.cos + pos * rotated / 2, p.sin + pos * rotated / 2, rotated, p.interleaved);
    __builtin_memcpy(to + rotated, from + rotated, size_t(x.D - rotated) * sizeof(T));
  }
}

template <typename T>
void append(const AppendKVCacheParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.S, s = token % p.S;
    const int64_t pos = p.seq_lens[b] - p.S + s;
    const int64_t rotated = p.cos && pos >= 0 ? p.rotary_dim : 0;
    move_token<T>(p, p.query, b, s, b, s, pos, rotated);
    if (pos < 0) continue;
    const int64_t row = p.block_table ? p.block_table[b * p.block_table_stride + pos / p.page_size] : b;
    const int64_t slot = p.block_table ? pos % p.page_size : pos;
    move_token<T>(p, p.key, b, s, row, slot, pos, rotated);
    move_token<T>(p, p.value, b, s, row, slot, pos, 0);
  }
}

}  // namespace

void append_kvcache(const AppendKVCacheParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) { append<typename decltype(tag)::type>(p, begin, end); });
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
