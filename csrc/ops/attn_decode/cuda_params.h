// Parameters and launchers of attention over fused caches on the GPU.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "ops/attn_decode/layout.h"
#include "ops/attn_decode/params.h"
#include "ops/attn_decode/schedule.h"

namespace fusedkv {

struct AttnCudaParams {
  AttnDecodeParams
      attn;          // without the CPU's members; partials: (slots, slot_rows, Dv) and (slots, slot_rows)
  int64_t capacity;  // tokens that a sequence may have
  Divisor by_group, by_page_size;
  int group;  // H / G
  int rows,
      row_groups;  // of the launch: query rows per work unit; work units per sequence and KV head, at most
  int slot_rows;   // of partial results: rows without padding
  bool batch_invariant;
  int max_splits;    // of a work unit, if batch_invariant: fixed_splits of the capacity
  int cache_rows;    // sequences or pages that the caches have
  int cost_sums;     // AttnLaunch
  bool aligned;      // every row of q and the caches starts at a multiple of 16 bytes
  bool whole_pages;  // tokens 16 i .. 16 i + 15 are consecutive in memory: contiguous caches, or pages of a
                     // multiple of 16
  const int32_t* schedule;  // (B + 1,) running sum of sequence_cost, or nullptr up to kMaxCopiedBatch
  int32_t* counters;        // finished chunks; one counter per block, or per work unit if batch_invariant;
                            // zeros between calls
};

// The factors of one side's tokens: of each source f16 (B, capacity, G) or (P, page_size, G), strides in
// elements. data[0] == nullptr: there are none.
struct TokenFactors {
  const f16* data[kMaxSources];
  int32_t stride_b[kMaxSources], stride_t[kMaxSources], stride_g[kMaxSources];
};

// Of coded.cu. Apart from the others, so that their launches pass no more than they read.
struct AttnCodedParams : AttnCudaParams {
  CodedLayout shared;
  int q_width;                 // 16, or another number: bytes that a lane may load at once from q
  int key_width, value_width;  // 8, 4 or 1 from codes, as q_width from raw caches
  TokenFactors key_factors, value_factors;  // instead of attn.key_scales and value_scales
};
static_assert(sizeof(AttnCodedParams) <= 4096, "a kernel has 4 KB of parameters");

// What the costs of a batch's sequences follow from.
struct SequenceCosts {
  int64_t B, S;
  int64_t capacity;
  int64_t window_left;
  const int32_t* seq_lens;  // (B,)
  bool batch_invariant;
  // Packed queries: cu_seqlens_q, or nullptr. A sequence's cost is then that of all its row groups.
  const int32_t* cu_seqlens_q;
  int64_t total_q;
  int group, rows;  // AttnCudaParams
};

FUSEDKV_HOST_DEVICE SequenceCosts sequence_costs(const AttnCudaParams& p) {
  const AttnDecodeParams& a = p.attn;
  return {a.B,       a.S,     p.capacity, a.window_left, a.seq_lens, p.batch_invariant, a.cu_seqlens_q,
          a.total_q, p.group, p.rows};
}

struct AttnScheduleParams {
  SequenceCosts costs;
  int32_t* schedule;  // (B + 1,)
  int32_t* counters;  // (num_counters,) set to zero
  int64_t num_counters;
};

// Of the current GPU: shared memory that a block may have, and the blocks of a call's grid, as many as run
// concurrently. Like all launchers these return a cudaError_t (0 = success).
int attn_shared_limit(int* bytes);
int attn_blocks(const AttnDecodeParams& p, const AttnLaunch& l, int* blocks);

int attn_schedule_cuda(const AttnScheduleParams& p, void* stream);
int attn_decode_cuda(const AttnCodedParams& p, const AttnLaunch& l, int blocks, void* stream);

}  // namespace fusedkv
