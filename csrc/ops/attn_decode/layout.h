// Blocks of the decode kernels: their threads and what lies where in shared memory; and the rule that picks a
// kernel. Host code and kernels both use it, so that what explain() prints is what runs.
#pragma once

#include "ops/attn_decode/params.h"

namespace fusedkv {

constexpr int kCellTokens = 32;

// ---- up to 8 query rows, one warp for itself (mma_warp.cu) --------------------------------------

struct WarpLayout {
  int warps, threads;
  int ring_bytes;  // per warp: two stages of 16 tokens of every source
  int pitch;       // floats from one row of a warp's output to the next, after the ring
  int shared_bytes;
};

constexpr WarpLayout warp_layout(int head_dim, int keys, int values) {
  WarpLayout l{};
  const int stage_bytes = (keys + values) * 16 * head_dim * 2;
  l.warps = stage_bytes > 8192 ? 2 : 4;
  l.threads = l.warps * 32;
  l.ring_bytes = 2 * stage_bytes;
  l.pitch = head_dim + 4;  // rows fall into different banks
  const int states = l.warps * 8 * (l.pitch + 2) * 4 + 16;
  l.shared_bytes = l.warps * l.ring_bytes > states ? l.warps * l.ring_bytes : states;
  return l;
}

// ---- 9 to 64 query rows, the warps of a block together (mma_block.cu) ---------------------------

struct RowsLayout {
  int warps, threads;
  int warp_rows;          // rows that a warp scores
  int channel_tiles;      // tiles of 16 channels, per source, whose values a warp adds
  int tile_bytes;         // 32 tokens of one source
  int probability_pitch;  // bytes from one token's probabilities to the next
  // Byte offsets: two stages of keys, then of values; queries (keys, rows, head_dim); probabilities (32
  // tokens, rows); maxima (2 halves of the tokens, rows); shrink (rows); sums (2, rows); one word.
  int value_ring, queries, probabilities, maxima, shrink, sums, flag;
  int shared_bytes;
};

constexpr RowsLayout rows_layout(int head_dim, int keys, int values, int rows) {
  RowsLayout l{};
  // With four warps the output of 64 rows would take half of the registers or more.
  l.warps = rows == 64 && head_dim >= 128 ? 8 : 4;
  l.threads = l.warps * 32;
  l.warp_rows = rows / (l.warps / 2);
  l.channel_tiles = head_dim / (16 * l.warps);
  l.tile_bytes = kCellTokens * head_dim * 2;
  l.probability_pitch = rows * 2 + 16;  // keeps ldmatrix and the stores free of bank conflicts
  l.value_ring = 2 * keys * l.tile_bytes;
  l.queries = l.value_ring + 2 * values * l.tile_bytes;
  l.probabilities = l.queries + keys * rows * head_dim * 2;
  l.maxima = l.probabilities + kCellTokens * l.probability_pitch;
  l.shrink = l.maxima + 2 * rows * 4;
  l.sums = l.shrink + rows * 4;
  l.flag = l.sums + 2 * rows * 4;
  l.shared_bytes = l.flag + 16;
  return l;
}

// ---- everything else (fallback.cu) --------------------------------------------------------------

constexpr int kGenericRows = 4;

struct GenericLayout {
  int threads;
  int lanes, teams;  // a team has 8 channels per lane
  int shared_bytes;
};

constexpr GenericLayout generic_layout(int head_dim) {
  GenericLayout l{};
  l.threads = 128;
  l.lanes = head_dim / 8;
  l.teams = l.threads / l.lanes;
  l.shared_bytes = l.teams * kGenericRows * (head_dim + 2) * 4 + 16;
  return l;
}

// ---- which one ----------------------------------------------------------------------------------

enum class AttnKernel { kWarp, kRows, kGeneric };

struct AttnLaunch {
  AttnKernel kernel;
  int head_dim;      // compiled head dim: the wider of D and Dv padded to 64, 128 or 256
  int rows;          // query rows per item
  int row_groups;    // items per sequence and KV head
  int threads;       // per block
  int shared_bytes;  // per block
};

// What attn_launch looks at.
struct AttnShape {
  DType dtype;
  int64_t rows;  // query rows per KV head, S * H / G
  int64_t D, Dv;
  int num_keys, num_values;
  bool aligned;      // every row of q and the caches starts at a multiple of 16 bytes
  int shared_limit;  // bytes of shared memory that a block may have
};

inline AttnLaunch attn_launch(const AttnShape& s) {
  const int64_t wider = s.D > s.Dv ? s.D : s.Dv;
  AttnLaunch l{};
  l.head_dim = wider <= 64 ? 64 : wider <= 128 ? 128 : 256;
  const int most_sources = l.head_dim == 256 ? 1 : 2;
  if (s.dtype == DType::f32 || !s.aligned || s.num_keys > most_sources || s.num_values > most_sources) {
    const GenericLayout layout = generic_layout(l.head_dim);
    l.kernel = AttnKernel::kGeneric;
    l.rows = kGenericRows;
    l.threads = layout.threads;
    l.shared_bytes = layout.shared_bytes;
  } else if (s.rows <= 8) {
    const WarpLayout layout = warp_layout(l.head_dim, s.num_keys, s.num_values);
    l.kernel = AttnKernel::kWarp;
    l.rows = 8;
    l.threads = layout.threads;
    l.shared_bytes = layout.shared_bytes;
  } else {
    l.kernel = AttnKernel::kRows;
    l.rows = s.rows <= 16 ? 16 : s.rows <= 32 ? 32 : 64;
    RowsLayout layout = rows_layout(l.head_dim, s.num_keys, s.num_values, l.rows);
    while (layout.shared_bytes > s.shared_limit && l.rows > 16) {
      l.rows /= 2;
      layout = rows_layout(l.head_dim, s.num_keys, s.num_values, l.rows);
    }
    l.threads = layout.threads;
    l.shared_bytes = layout.shared_bytes;
  }
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
