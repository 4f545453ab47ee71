// Thread blocks of the decode kernels, their layout of shared memory, and the rule that selects a kernel.
// Host code and kernels both use it, so that explain() prints what runs.
#pragma once

#include "ops/attn_decode/params.h"
#include "ops/attn_decode/schedule.h"

namespace fusedkv {

// Shared memory after that of a layout: one word that tells a block whether it merges.
constexpr int kFlagBytes = 16;

// ---- mma_warp.cu: up to 8 query rows, every warp independent ------------------------------------

struct MmaWarpLayout {
  int ring_bytes;  // per warp: two stages of 16 tokens of every source
  int pitch;       // floats from one row of a warp's output to the next
  int warp_bytes;  // ring and softmax state: maximum, sum and output of 8 rows
};

constexpr MmaWarpLayout mma_warp_layout(int head_dim, int keys, int values) {
  MmaWarpLayout l{};
  l.ring_bytes = 2 * (keys + values) * 16 * head_dim * 2;
  l.pitch = head_dim + 4;  // rows fall into different banks
  l.warp_bytes = l.ring_bytes + 8 * (l.pitch + 2) * 4;
  return l;
}

constexpr int kSharedBytesSm90 = 227 * 1024;  // that a block may have; no architecture permits more

// One block per SM, with as many warps as shared memory holds. More than 12 warps would have too few
// registers each.
constexpr int mma_warp_count(int head_dim, int keys, int values, int shared_bytes) {
  const int warps = (shared_bytes - kFlagBytes) / mma_warp_layout(head_dim, keys, values).warp_bytes;
  return warps < 1 ? 1 : warps < 12 ? warps : 12;
}

// ---- mma_block.cu: 9 to 64 query rows, the warps of a block cooperate ---------------------------

struct MmaBlockLayout {
  int warps, threads;
  int warp_rows;          // rows that a warp scores
  int channel_tiles;      // tiles of 16 channels, per source, whose values a warp adds
  int tile_bytes;         // 32 tokens of one source
  int probability_pitch;  // bytes from one token's probabilities to the next
  // Byte offsets: two stages of keys, then of values; queries (keys, rows, head_dim); probabilities (32
  // tokens, rows); maxima (2 halves of the tokens, rows); rescale (rows); sums (2, rows).
  int value_ring, queries, probabilities, maxima, rescale, sums, flag;
};

// Query rows of a block: more of two sources of 256 channels have no place in the registers.
constexpr int max_block_rows(int head_dim, int keys, int values) {
  return head_dim == 256 && keys + values > 2 ? 32 : 64;
}

constexpr MmaBlockLayout mma_block_layout(int head_dim, int keys, int values, int rows) {
  MmaBlockLayout l{};
  // With four warps a larger output would take half of the registers or more.
  l.warps = rows * head_dim >= 64 * 128 ? 8 : 4;
  l.threads = l.warps * 32;
  l.warp_rows = rows / (l.warps / 2);
  l.channel_tiles = head_dim / (16 * l.warps);
  l.tile_bytes = kKVTileTokens * head_dim * 2;
  l.probability_pitch = rows * 2 + 16;  // keeps ldmatrix and the stores free of bank conflicts
  l.value_ring = 2 * keys * l.tile_bytes;
  l.queries = l.value_ring + 2 * values * l.tile_bytes;
  l.probabilities = l.queries + keys * rows * head_dim * 2;
  l.maxima = l.probabilities + kKVTileTokens * l.probability_pitch;
  l.rescale = l.maxima + 2 * rows * 4;
  l.sums = l.rescale + rows * 4;
  l.flag = l.sums + 2 * rows * 4;
  return l;
}

// ---- fallback.cu: everything else ---------------------------------------------------------------

constexpr int kFallbackRows = 4;

struct FallbackLayout {
  int threads;
  int lanes, teams;  // lanes of a team, 8 channels each; teams of a block
  int state_bytes;   // maximum, sum and output of 4 rows of every team
};

constexpr FallbackLayout fallback_layout(int head_dim) {
  FallbackLayout l{};
  l.threads = 128;
  l.lanes = head_dim / 8;
  l.teams = l.threads / l.lanes;
  l.state_bytes = l.teams * kFallbackRows * (head_dim + 2) * 4;
  return l;
}

// ---- coded.cu: caches of codes, and what belongs to them; the teams of fallback.cu ---------------

// Byte offsets of what a block keeps in fp32, and of the end: numbers of the 4-bit codes; weights of the
// value sources, then the bias, (values + 1, head_dim); folded queries (keys, 4 rows, head_dim), or, where
// they have no place, those of one source at a time.
struct CodedLayout {
  int numbers, value_weights, queries, end;
  bool holds_queries;
};

constexpr CodedLayout coded_layout(int head_dim, int keys, int values, bool holds_queries) {
  CodedLayout l{};
  l.holds_queries = holds_queries;
  l.numbers = fallback_layout(head_dim).state_bytes + kFlagBytes;
  l.value_weights = l.numbers + kCodebook * 4;
  l.queries = l.value_weights + (values + 1) * head_dim * 4;
  l.end = l.queries + (holds_queries ? keys : 1) * kFallbackRows * head_dim * 4;
  return l;
}

// ---- selection ----------------------------------------------------------------------------------

enum class AttnKernel { kMmaWarp, kMmaBlock, kCoded, kFallback };

// The files of the kernels, below csrc/ops: their names for users.
constexpr const char* kCpuKernelFile = "attn_decode/cpu.cpp";

inline const char* kernel_file(AttnKernel kernel) {
  switch (kernel) {
    case AttnKernel::kMmaWarp:
      return "attn_decode/mma_warp.cu";
    case AttnKernel::kMmaBlock:
      return "attn_decode/mma_block.cu";
    case AttnKernel::kCoded:
      return "attn_decode/coded.cu";
    default:
      return "attn_decode/fallback.cu";
  }
}

struct AttnLaunch {
  AttnKernel kernel;
  int head_dim;       // compiled head dim: the wider of D and Dv padded to 64, 128 or 256
  int rows;           // query rows per work unit
  int row_groups;     // work units per sequence and KV head
  int threads;        // per block
  int cost_sums;      // byte offset in shared memory of the block's copy of the schedule
  int shared_bytes;   // per block
  CodedLayout coded;  // if kernel is kCoded
};

// The arguments of attn_launch.
struct AttnShape {
  DType dtype;
  int64_t B;
  int64_t rows;  // query rows per KV head, S * H / G
  int64_t D, Dv;
  int num_keys, num_values;
  bool aligned;        // every row of q and the caches starts at a multiple of 16 bytes
  int shared_limit;    // bytes of shared memory that a block may have
  bool coded = false;  // codes, factors of tokens, a query per key source or a bias of the values
};

inline AttnLaunch attn_launch(const AttnShape& s) {
  const int64_t wider = s.D > s.Dv ? s.D : s.Dv;
  AttnLaunch l{};
  l.head_dim = wider <= 64 ? 64 : wider <= 128 ? 128 : 256;
  const int cost_bytes = cost_sums_bytes(s.B), limit = s.shared_limit - cost_bytes;
  // One warp cannot hold the output of two sources of 256 channels. A block can, on GPUs that have the
  // memory.
  const bool wide = l.head_dim == 256 && s.num_keys + s.num_values > 2;
  const auto block_bytes = [&](int rows) {
    return mma_block_layout(l.head_dim, s.num_keys, s.num_values, rows).flag + kFlagBytes;
  };
  if (s.coded) {
    l.kernel = AttnKernel::kCoded;
    l.rows = kFallbackRows;
    l.threads = fallback_layout(l.head_dim).threads;
    l.coded = coded_layout(l.head_dim, s.num_keys, s.num_values, true);
    if (l.coded.end > limit) l.coded = coded_layout(l.head_dim, s.num_keys, s.num_values, false);
    l.cost_sums = l.coded.end;
  } else if (s.dtype == DType::f32 || !s.aligned || s.num_keys > 2 || s.num_values > 2 ||
             (wide && block_bytes(16) > limit)) {
    const FallbackLayout layout = fallback_layout(l.head_dim);
    l.kernel = AttnKernel::kFallback;
    l.rows = kFallbackRows;
    l.threads = layout.threads;
    l.cost_sums = layout.state_bytes + kFlagBytes;
  } else if (s.rows <= 8 && !wide) {
    const int warps = mma_warp_count(l.head_dim, s.num_keys, s.num_values, limit);
    l.kernel = AttnKernel::kMmaWarp;
    l.rows = 8;
    l.threads = warps * 32;
    l.cost_sums = warps * mma_warp_layout(l.head_dim, s.num_keys, s.num_values).warp_bytes + kFlagBytes;
  } else {
    l.kernel = AttnKernel::kMmaBlock;
    const int most = max_block_rows(l.head_dim, s.num_keys, s.num_values);
    l.rows = s.rows <= 16 ? 16 : s.rows <= 32 ? 32 : most;
    while (block_bytes(l.rows) > limit && l.rows > 16) l.rows /= 2;
    l.threads = mma_block_layout(l.head_dim, s.num_keys, s.num_values, l.rows).threads;
    l.cost_sums = block_bytes(l.rows);
  }
  l.shared_bytes = l.cost_sums + cost_bytes;
  l.row_groups = int((s.rows + l.rows - 1) / l.rows);
  return l;
}

constexpr int kMaxBlocksPerSm = 8;
constexpr int kMaxBlocks = 2048;

// Blocks of a grid that fills the GPU once.
inline int grid_blocks(int sm_count, int per_sm) {
  const int blocks = sm_count * (per_sm < 1 ? 1 : per_sm < kMaxBlocksPerSm ? per_sm : kMaxBlocksPerSm);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

}  // namespace fusedkv
