// Attention of a few query rows over cached keys and values that are fused from several layers, split over
// the sequence.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/limits.h"
#include "ops/attn_decode/visibility.h"

namespace fusedkv {

// Tokens per split on the CPU. Fixed: a sequence gets the same splits, hence the same bits, in any batch and
// with any number of threads.
constexpr int64_t kSplitTokens = 512;

// Query rows (s, head of the group) that a CPU task keeps at most. More rows mean more tasks that read the
// same keys and values.
constexpr int64_t kMaxTaskRows = 32;

// One cache: contiguous (B, capacity, G, D) or paged (P, page_size, G, D). Strides in elements, last dim
// contiguous.
struct CacheTensor {
  const void* data;
  int64_t stride_b;  // of a sequence, or of a page
  int64_t stride_t;  // of a token in it
  int64_t stride_g;  // of a KV head
};

struct AttnDecodeParams {
  DType dtype;  // of q, raw caches and out: f32, bf16 or f16
  CacheCode key_code, value_code;
  int64_t B, S, H, G, D, Dv;  // H a multiple of G; D and Dv multiples of 8
  // q is (B, S, H, D). With cu_seqlens_q it is packed, (1, total_q, H, D): sequence b has the query tokens
  // cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1, at most S.
  const void* q;
  int64_t q_stride_b, q_stride_s, q_stride_h;
  int64_t q_stride_source;          // from the query of one key source to that of the next; 0: they share one
  const int32_t* cu_seqlens_q;      // (B + 1,) or nullptr
  int64_t total_q;                  // query tokens of all sequences
  int num_keys, num_values;         // sources of keys and of values, 1 .. kMaxSources
  CacheTensor keys[kMaxSources];    // head dim D
  CacheTensor values[kMaxSources];  // head dim Dv
  const float* key_weights;         // (num_keys, G, D) or nullptr: all ones
  const float* value_weights;       // (num_values, G, Dv) or nullptr: all ones
  // Numbers of the 4-bit codes, or nullptr: code n is n - 8.
  const float* codebook;
  // f16 factors of the scores and of the probabilities of each token and KV head, one tensor per source; or
  // nullptr.
  const CacheTensor *key_scales, *value_scales;
  const float* value_bias;     // (G, Dv) added to every fused value, or nullptr
  const int32_t* seq_lens;     // (B,) valid tokens of each sequence, the S new ones included
  const int32_t* block_table;  // (B, max_pages) page of each page_size tokens, or nullptr: contiguous caches
  int64_t block_table_stride;
  int64_t page_size;
  float scale;                        // softmax scale, natural-log domain
  int64_t window_left, window_right;  // visibility.h

  // A score is x = scale * (q . k). In this order, each if it is on:
  float softcap;              // > 0: x becomes softcap * tanh(x / softcap)
  float inverse_softcap;      // 1 / softcap
  const float* alibi_slopes;  // (H,) or (B, H): x - slope * |position of the row - token|; or nullptr
  int64_t alibi_stride_b;     // 0 for (H,)
  const float* sinks;         // (H,) or nullptr: one more score per row, natural log, with a value of zero

  // CPU. A task is one (sequence, split, row group, block of task_heads KV heads).
  int64_t task_heads;              // KV heads that a task processes together
  const int64_t* task_offsets;     // (B + 1,) first task of each sequence, of one block of heads
  const int64_t* partial_offsets;  // (B + 1,) first partial row of each sequence

  // Partial results. CPU: of each sequence (splits, G, its rows, Dv) and (splits, G, its rows). CUDA:
  // cuda_params.h.
  float* partial_out;  // normalized output of a split
  float* partial_lse;  // its log2-sum-exp2

  void* out;   // (total_q, H, Dv) contiguous
  float* lse;  // (B, H, S), packed queries: (H, total_q); natural log
};

// Whether a kernel for codes has to run. Queries per source and a bias are part of every CPU kernel.
static inline bool is_coded(const AttnDecodeParams& p) {
  return p.key_code != CacheCode::raw || p.value_code != CacheCode::raw || p.key_scales || p.value_scales;
}

// Whether scores are more than scaled products.
FUSEDKV_HOST_DEVICE bool adjusts_scores(const AttnDecodeParams& p) {
  return p.softcap > 0.f || p.alibi_slopes;
}

FUSEDKV_HOST_DEVICE float alibi_slope(const AttnDecodeParams& p, int64_t b, int64_t h) {
  return p.alibi_slopes[b * p.alibi_stride_b + h];
}

// The query tokens of a sequence, in q and in out.
struct QueryRange {
  int64_t first, count;
};

FUSEDKV_HOST_DEVICE int64_t query_offset(const AttnDecodeParams& p, int64_t b, int64_t first, int64_t s,
                                         int64_t h) {
  return (p.cu_seqlens_q ? first * p.q_stride_s : b * p.q_stride_b) + s * p.q_stride_s + h * p.q_stride_h;
}

FUSEDKV_HOST_DEVICE int64_t out_offset(const AttnDecodeParams& p, int64_t first, int64_t s, int64_t h) {
  return ((first + s) * p.H + h) * p.Dv;
}

FUSEDKV_HOST_DEVICE int64_t lse_offset(const AttnDecodeParams& p, int64_t b, int64_t first, int64_t s,
                                       int64_t h) {
  return p.cu_seqlens_q ? h * p.total_q + first + s : (b * p.H + h) * p.S + s;
}

// ---- CPU ----------------------------------------------------------------------------------------

static inline QueryRange queries_of(const AttnDecodeParams& p, int64_t b) {
  if (!p.cu_seqlens_q) return {b * p.S, p.S};
  return {p.cu_seqlens_q[b], p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]};
}

// The tokens that any query row of sequence b sees.
static inline TokenRange visible_tokens(const AttnDecodeParams& p, int64_t b) {
  return visible_to_any_row<int64_t>(p.seq_lens[b], queries_of(p, b).count, p.window_left);
}

// Splits lie on a fixed grid, so that a sliding window does not move every split.
static inline int64_t num_splits(const AttnDecodeParams& p, int64_t b) {
  const TokenRange range = visible_tokens(p, b);
  if (range.begin >= range.end || queries_of(p, b).count == 0) return 0;
  return (range.end - 1) / kSplitTokens - range.begin / kSplitTokens + 1;
}

// Query rows of one KV head: of a sequence with S query tokens, the most, and of sequence b.
static inline int64_t num_rows(const AttnDecodeParams& p) {
  return p.S * (p.H / p.G);
}

static inline int64_t num_rows(const AttnDecodeParams& p, int64_t b) {
  return queries_of(p, b).count * (p.H / p.G);
}

// How a sequence's rows are divided among tasks.
static inline int64_t num_row_groups(const AttnDecodeParams& p, int64_t b) {
  return (num_rows(p, b) + kMaxTaskRows - 1) / kMaxTaskRows;
}

static inline int64_t num_head_blocks(const AttnDecodeParams& p) {
  return (p.G + p.task_heads - 1) / p.task_heads;
}

// An upper bound of a thread's workspace in bytes, for any SIMD target.
static inline int64_t attn_decode_workspace(const AttnDecodeParams& p) {
  const int64_t rows = (num_rows(p) < kMaxTaskRows ? num_rows(p) : kMaxTaskRows) + 15;
  const int64_t per_row = p.num_keys * (p.D + 62) + p.num_values * (p.Dv + 62) + 19;
  return (p.task_heads * rows * per_row + rows * 32) * int64_t(sizeof(float));
}

}  // namespace fusedkv
