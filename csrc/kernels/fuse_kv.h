// out = sum_j w_j (.) x_j over m source layers, broadcast over tokens, and its gradients. Parameters and
// launchers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fusedkv {

constexpr int kMaxSources = 32;

// Tokens per partial weight gradient. Fixed, so that the sum has one order whatever the number of threads.
constexpr int64_t kFuseChunkTokens = 256;

// One tensor (B, T, G, D); strides in elements, the last dim is contiguous.
struct TokenTensor {
  const void* data;
  int64_t stride_b;
  int64_t stride_t;
  int64_t stride_g;
};

struct FuseKVParams {
  DType dtype;                       // of the sources, the output and the gradients
  int64_t B, T, G, D;                // D a multiple of 8
  int m;                             // 1 .. kMaxSources
  TokenTensor sources[kMaxSources];  // m x (B, T, G, D)
  const void* weights;               // (m, G, D) contiguous; float64 for f64 sources, else float32
  void* out;                         // (B, T, G, D) contiguous; forward only

  const void* grad_out;   // (B, T, G, D) contiguous; backward only
  void* grad_sources;     // (m, B, T, G, D) contiguous, may be nullptr
  void* partial_weights;  // (chunks, m, G, D), chunks = ceil(B * T / kFuseChunkTokens), may be nullptr
  void* grad_weights;     // (m, G, D); partial_weights summed pairwise
};

// Data pointers and strides must keep 16-byte alignment. `stream` is a cudaStream_t; returns a cudaError_t (0
// = success).
int fuse_kv_forward_cuda(const FuseKVParams& params, void* stream);

}  // namespace fusedkv
