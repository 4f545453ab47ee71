// How the GPU's work is divided among blocks. Host code and kernels both use it.
//
//   KV tile    32 consecutive tokens of one sequence, on a fixed grid from position 0
//   work unit  what one block can do alone: the KV tiles of a sequence for one KV head and one group of rows
//   chunk      the part of a work unit that one block does
//   quota      the consecutive tiles that each block gets
//
// The schedule of a step is the running sum of the sequences' costs. Everything else follows by arithmetic:
// all work units of all sequences form one row, and block i takes the i-th quota of it. The grid never
// depends on the lengths. A work unit of several chunks is a split one. The block that finishes its last
// chunk merges the chunks in their order.
//
// Every block has a copy of the running sum in shared memory: from a schedule that all layers of a step
// share, or summed by itself from the lengths. Only larger batches need a schedule, which blocks read in
// place.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "ops/attn_decode/visibility.h"

namespace fusedkv {

constexpr int kKVTileTokens = 32;
// What starting a work unit costs, in KV tiles: its queries are folded, its output is merged.
constexpr int kUnitCostTiles = 1;
// The smallest quota: merging more chunks would take longer than it saves.
constexpr int kMinBlockTiles = 3;
// The largest batch whose running sum fits in a block's shared memory.
constexpr int kMaxCopiedBatch = 1024;
// Batch-invariant mode: splits of this many KV tiles, for any batch.
constexpr int kFixedSplitTiles = 32;

// Bytes of a block's copy of the running sum.
constexpr int cost_sums_bytes(int64_t B) {
  return B <= kMaxCopiedBatch ? int(B + 1) * 4 : 0;
}

// KV tiles [begin, end).
struct KVTileRange {
  int begin, end;
};

// The visible KV tiles of a sequence; at least one, so that some block writes its zeros.
FUSEDKV_HOST_DEVICE KVTileRange visible_kv_tiles(int64_t len, int64_t S, int64_t capacity,
                                                 int64_t window_left) {
  if (len <= 0 || len > capacity) return {0, 1};
  return {int(visible_to_any_row(len, S, window_left).begin / kKVTileTokens),
          int((len + kKVTileTokens - 1) / kKVTileTokens)};
}

// What one work unit of a sequence costs: KV tiles, or fixed splits if batch_invariant.
FUSEDKV_HOST_DEVICE int sequence_cost(KVTileRange tiles, bool batch_invariant) {
  if (!batch_invariant) return tiles.end - tiles.begin + kUnitCostTiles;
  return (tiles.end + kFixedSplitTiles - 1) / kFixedSplitTiles - tiles.begin / kFixedSplitTiles;
}

// The most splits of a work unit in batch-invariant mode.
FUSEDKV_HOST_DEVICE int fixed_splits(int64_t capacity) {
  constexpr int64_t kSplit = kFixedSplitTiles * kKVTileTokens;
  return capacity <= kSplit ? 1 : int((capacity + kSplit - 1) / kSplit);
}

// Room for the partial results of split work units, slots of some rows each. A block has at most two split
// work units. With fixed splits every split has a slot. `units`: B * G * row groups.
FUSEDKV_HOST_DEVICE int64_t partial_slots(int64_t units, int blocks, int max_splits, bool batch_invariant) {
  return batch_invariant ? units * max_splits : 2 * int64_t(blocks);
}

// Block i does [i * quota, (i + 1) * quota) of a total cost.
FUSEDKV_HOST_DEVICE int64_t block_quota(int64_t total, int blocks, bool batch_invariant) {
  const int64_t quota = (total + blocks - 1) / blocks;
  const int64_t least = batch_invariant ? 1 : kMinBlockTiles;
  return quota < least ? least : quota;
}

}  // namespace fusedkv
