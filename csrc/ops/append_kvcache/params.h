// Scatter of S new tokens into a contiguous or paged cache, with RoPE on their keys and queries.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fusedkv {

// New tokens (B, S, heads, D) and their destination. Strides in elements, last dims contiguous.
struct AppendTensor {
  const void* src;
  int64_t src_stride_b, src_stride_s, src_stride_g;
  void* dst;  // a cache (B, capacity, heads, D) or (P, page_size, heads, D); for queries (B, S, heads, D)
  int64_t dst_stride_b, dst_stride_t, dst_stride_g;
  int64_t heads, D;
  // Of a cache of codes: nothing else, if the new tokens are codes too and are copied; or what encodes them,
  // (x - center) / scale of each (head, channel). center: nullptr is 0.
  CacheCode code;
  const float *scale, *center;
};

// Bytes of a row in elements of the cache's type, if it is copied.
static inline int64_t copied_bytes(const AppendTensor& x, DType dtype) {
  return cache_elements(x.code, x.D) * size_of(x.code, dtype);
}

struct AppendKVCacheParams {
  DType dtype;  // of what is not codes
  int64_t B, S;
  AppendTensor query;       // rotated into a new tensor; no heads: there is no query
  AppendTensor key, value;  // numbers of heads and head dims may differ
  const int32_t*
      seq_lens;  // (B,) after the append; token s is at position seq_lens[b] - S + s, skipped if < 0
  const int32_t* block_table;  // (B, max_pages) or nullptr
  int64_t block_table_stride;
  int64_t capacity;  // tokens per sequence
  int64_t num_pages, page_size;
  const float* cos;  // (rotary_rows, rotary_dim / 2), row p for position p, or nullptr: nothing is rotated
  const float* sin;
  int64_t rotary_rows;
  int64_t rotary_dim;  // rotated channels, <= key.D
  bool interleaved;    // pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2)
};

// Returns a cudaError_t; `stream` is a cudaStream_t. Lengths and pages out of range are not written.
int append_kvcache_cuda(const AppendKVCacheParams& params, void* stream);

}  // namespace fusedkv
