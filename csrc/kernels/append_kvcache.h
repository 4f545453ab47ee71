// Scatter of S new tokens into a contiguous or paged cache, with RoPE on the keys on the way.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fusedkv {

// New tokens (B, S, G, D) and where they go. Strides in elements, last dims contiguous.
struct AppendTensor {
  const void* src;
  int64_t src_stride_b, src_stride_s, src_stride_g;
  void* cache;  // (B, capacity, G, D) or (P, page_size, G, D)
  int64_t cache_stride_b, cache_stride_t, cache_stride_g;
  int64_t G, D;
};

struct AppendKVCacheParams {
  DType dtype;
  int64_t B, S;
  AppendTensor key, value;  // numbers of heads and head dims may differ
  const int32_t*
      seq_lens;  // (B,) length after the append; token s goes to position seq_lens[b] - S + s, skipped if < 0
  const int32_t* block_table;  // (B, max_pages) or nullptr
  int64_t block_table_stride;
  int64_t page_size;
  const float* cos;  // (max_len, rotary_dim / 2) or nullptr: keys are not rotated
  const float* sin;
  int64_t rotary_dim;  // rotated channels, <= key.D
  bool interleaved;    // pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2)
};

}  // namespace fusedkv
