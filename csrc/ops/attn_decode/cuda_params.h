// Split-KV attention over fused caches on the GPU: parameters, how the work is cut, and launchers.
//
// Words: a cell is 32 consecutive tokens of one sequence, on a fixed grid from position 0. An item is what
// one block can do alone: the cells of one sequence for one KV head and one group of query rows. A piece is
// the part of an item that one block does; an item of several pieces is a split one, and its pieces are
// merged in their order by whichever block finishes last.
//
// The schedule of a step is the running sum of the sequences' costs. Everything else follows from it by
// arithmetic: all items of all sequences stand in a row, the row is cut into equal ranges, and block i takes
// range i. So the grid never depends on the lengths, and all layers of a step share one schedule.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "ops/attn_decode/layout.h"
#include "ops/attn_decode/params.h"

namespace fusedkv {

// What starting an item costs, in cells: its queries are folded, its output is merged.
constexpr int kItemCostCells = 1;
// No block gets less than this many cells: merging more pieces would take longer than it saves.
constexpr int kMinBlockCells = 4;
// Batch-invariant mode: splits of this many cells, whatever else is in the batch.
constexpr int kFixedSplitCells = 32;

struct AttnCudaParams {
  AttnDecodeParams attn;  // task_offsets is not used; partials: (slots, slot_rows, Dv) and (slots, slot_rows)
  int64_t capacity;       // tokens that a sequence may have
  int64_t num_pages;
  int group, num_rows;   // H / G; query rows per KV head, S * H / G
  int rows, row_groups;  // of the launch: query rows per item, and items per sequence and KV head
  int slot_rows;         // of partial results: rows without padding
  bool batch_invariant;
  int max_splits;    // of an item, if batch_invariant: fixed_splits of the capacity
  bool aligned;      // every row of q and the caches starts at a multiple of 16 bytes
  bool whole_pages;  // tokens 16 i .. 16 i + 15 follow each other: contiguous caches, or pages of a multiple
                     // of 16
  const int32_t* schedule;  // (B + 1,) running sum of sequence_cost
  int32_t* counters;        // pieces that have arrived; one per block, or per item if batch_invariant; zeros
                            // between calls
};

struct AttnScheduleParams {
  int64_t B, S;
  int64_t capacity;
  int64_t window_left;
  const int32_t* seq_lens;  // (B,)
  bool batch_invariant;
  int32_t* schedule;  // (B + 1,)
  int32_t* counters;  // (num_counters,) set to zero
  int64_t num_counters;
};

// Of the current GPU: shared memory that a block may have, and the blocks of a call's grid, as many as run at
// the same time. Like all launchers these return a cudaError_t (0 = success).
int attn_shared_limit(int* bytes);
int attn_blocks(const AttnDecodeParams& p, const AttnLaunch& l, int* blocks);

int attn_schedule_cuda(const AttnScheduleParams& p, void* stream);
int attn_decode_cuda(const AttnCudaParams& p, const AttnLaunch& l, int blocks, void* stream);

// ---- how the work is cut -----------------------------------------------------------------------

// The first token that any query row of a sequence sees.
FUSEDKV_HOST_DEVICE int64_t first_seen_token(int64_t len, int64_t S, int64_t window_left) {
  const int64_t first_row = len > S ? len - S : 0;
  return window_left >= 0 && first_row > window_left ? first_row - window_left : 0;
}

// The visible cells [begin, end) of a sequence; at least one, so that somebody writes its zeros.
struct CellRange {
  int begin, end;
};

FUSEDKV_HOST_DEVICE CellRange visible_cells(int64_t len, int64_t S, int64_t capacity, int64_t window_left) {
  if (len <= 0 || len > capacity) return {0, 1};
  return {int(first_seen_token(len, S, window_left) / kCellTokens),
          int((len + kCellTokens - 1) / kCellTokens)};
}

// What one item of a sequence costs: cells, or fixed splits if batch_invariant.
FUSEDKV_HOST_DEVICE int sequence_cost(CellRange cells, bool batch_invariant) {
  if (!batch_invariant) return cells.end - cells.begin + kItemCostCells;
  return (cells.end + kFixedSplitCells - 1) / kFixedSplitCells - cells.begin / kFixedSplitCells;
}

// The most splits that an item has in batch-invariant mode.
FUSEDKV_HOST_DEVICE int fixed_splits(int64_t capacity) {
  constexpr int64_t kSplitTokens = kFixedSplitCells * kCellTokens;
  return capacity <= kSplitTokens ? 1 : int((capacity + kSplitTokens - 1) / kSplitTokens);
}

// What each block does of a total cost: [block * share, (block + 1) * share).
FUSEDKV_HOST_DEVICE int64_t block_share(int64_t total, int blocks, bool batch_invariant) {
  const int64_t share = (total + blocks - 1) / blocks;
  const int64_t least = batch_invariant ? 1 : kMinBlockCells;
  return share < least ? least : share;
}

}  // namespace fusedkv
