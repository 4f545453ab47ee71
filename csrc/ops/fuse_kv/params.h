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

  bool stream;  // CPU: write the results past the caches, where they are aligned for it

  // Forward.
  void* out;  // (B, T, G, D) contiguous

  // Forward from caches, where seq_lens is not nullptr: output token t of sequence b is that at position
  // seq_lens[b] - T + t, which lies in page block_table[b, position / page_size] of a paged cache.
  const int32_t* seq_lens;
  const int32_t* block_table;  // nullptr: caches (B, capacity, G, D)
  int64_t block_table_stride;
  int64_t num_pages;
  int64_t page_size;
  int64_t capacity;  // tokens per sequence

  // Backward.
  const void* grad_out;             // (B, T, G, D) contiguous
  void* grad_sources[kMaxSources];  // m x (B, T, G, D) contiguous; all nullptr: not wanted
  DType grad_dtype;                 // of grad_sources: dtype, or f32 where they are accumulated
  bool accumulate;                  // add to grad_sources, which then do not overlap
  void* partial_weights;            // (chunks, m, G, D), may be nullptr
  void* grad_weights;               // (m, G, D): partial_weights summed pairwise
};

static inline int64_t num_chunks(const FuseKVParams& p) {
  return (p.B * p.T + kFuseChunkTokens - 1) / kFuseChunkTokens;
}

// For these, B and T are below 2^31, and all data pointers and strides keep 16-byte alignment. `stream` is a
// cudaStream_t; they return a cudaError_t (0 = success).

// One or two sums (keys and values) in one launch: of one dtype, B, T and G.
int fuse_kv_forward_cuda(const FuseKVParams* sums, int count, void* stream);

// grad_sources and grad_weights, each where wanted.
int fuse_kv_backward_cuda(const FuseKVParams& params, void* stream);

}  // namespace fusedkv
