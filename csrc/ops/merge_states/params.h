// Attention over several disjoint sets of keys, put together.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/limits.h"

namespace fusedkv {

// Attention of all query rows over one set of keys. Strides in elements, last dim of out contiguous.
struct AttnState {
  const void* out;  // (B, S, H, D)
  int64_t out_stride_b, out_stride_s, out_stride_h;
  const float* lse;  // (B, H, S), -inf: no keys
  int64_t lse_stride_b, lse_stride_h, lse_stride_s;
};

struct MergeStatesParams {
  DType dtype;  // of out
  int n;
  AttnState states[kMaxSources];
  int64_t B, S, H, D;
  void* out;   // (B, S, H, D) contiguous
  float* lse;  // (B, H, S) contiguous
};

// Returns a cudaError_t; `stream` is a cudaStream_t.
int merge_states_cuda(const MergeStatesParams& params, void* stream);

}  // namespace fusedkv
