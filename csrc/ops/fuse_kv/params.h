// out = sum_j w_j (.) x_j over m source layers, broadcast over tokens, and its gradients. Parameters and
// launchers.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/limits.h"

namespace fusedkv {

// Tokens per partial weight gradient. Fixed, so that the sum has one order whatever the number of threads.
constexpr int64_t kFuseChunkTokens = 256;

// One tensor (B, T, G, D), or pages (P, page_size, G, D); strides in elements, the last dim is contiguous.
struct TokenTensor {
  const void* data;
  int64_t stride_b;
  int64_t stride_t;
  int64_t stride_g;
};

struct FuseKVParams {
  DType dtype;                       // of the sources and the output
  int m;                             // 1 .. kMaxSources
  int64_t B, T, G, D;                // of the output; D a multiple of 8
  TokenTensor sources[kMaxSources];  // m x (B, T, G, D), or caches
  const void* weights;               // (m, G, D) contiguous; float64 for f64 sources, else float32

  bool stream;  // CPU: non-temporal stores of the results, where aligned

  // Forward.
  void* out;  // (B, T, G, D) contiguous

  // Forward from caches, if seq_lens is not nullptr: output token t of sequence b is at position
  // seq_lens[b] - T + t, in page block_table[b, position / page_size] of a paged cache.
  const int32_t* seq_lens;
  const int32_t* block_table;  // nullptr: caches (B, capacity, G, D)
  int64_t block_table_stride;
  int64_t num_pages;
  int64_t page_size;
  int64_t capacity;  // tokens per sequence

  // Backward.
  const void* grad_out;             // (B, T, G, D) contiguous
  void* grad_sources[kMaxSources];  // m x (B, T, G, D) contiguous, or all nullptr
  DType grad_dtype;                 // of grad_sources: dtype, or f32 where they are accumulated
  bool accumulate;                  // add to grad_sources, which then do not overlap
  void* partial_weights;            // (chunks, m, G, D), may be nullptr
  void* grad_weights;               // (m, G, D): partial_weights summed pairwise
};

static inline int64_t num_chunks(const FuseKVParams& p) {
  return (p.B * p.T + kFuseChunkTokens - 1) / kFuseChunkTokens;
}

// The launchers require B and T below 2^31 and data pointers and strides aligned to 16 bytes. `stream` is a
// cudaStream_t. They return a cudaError_t, 0 for success.

// One or two sums (keys and values) of the same dtype, B, T and G in one launch.
int fuse_kv_forward_cuda(const FuseKVParams* sums, int count, void* stream);

// grad_sources and grad_weights, each unless nullptr.
int fuse_kv_backward_cuda(const FuseKVParams& params, void* stream);

}  // namespace fusedkv
