// What the decode kernels share: finding a block's pieces, finding tokens in caches, finishing a piece.
#pragma once

#include "cuda/elements.cuh"
#include "ops/attn_decode/cuda_params.h"

namespace fusedkv {

constexpr float kLn2 = 0.693147180559945309417f, kLog2e = 1.44269504088896340736f;
constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() {
  return __uint_as_float(0xff800000u);
}

__device__ __forceinline__ float not_a_number() {
  return __uint_as_float(0x7fffffffu);
}

// ---- pieces ------------------------------------------------------------------------------------

// One block's part of an item: split `split` of `splits`, which all leave their partial results in slots.
struct WorkPiece {
  int b, g, row_begin;         // sequence, KV head, first query row
  int len;                     // valid tokens; -1: out of range, the output is NaN
  int token_begin, token_end;  // tokens to look at; both 0 for a sequence without any
  int split, splits;
  int64_t slot0, slot1, slot_step;  // of split 0; of split 1; between further splits
  int64_t counter;
  int64_t next;  // where the block's range goes on

  __device__ int64_t slot(int k) const { return k == 0 ? slot0 : slot1 + (k - 1) * slot_step; }
};

// The sequence b with schedule[b] * items <= at < schedule[b + 1] * items, found by 32 lanes together.
__device__ __forceinline__ int find_sequence(const AttnCudaParams& p, int64_t at, int64_t items) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = int(p.attn.B);
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool before = probe < high && load(p.schedule + probe) * items <= at;
    low += (__popc(__ballot_sync(kFullWarp, before)) - 1) * step;
    high = low + step < high ? low + step : high;
  }
  return low < 0 ? 0 : low;
}

// This block's range of the row of all items, `total` of them.
struct BlockWork {
  int64_t begin, end, share, total;
};

__device__ __forceinline__ BlockWork block_work(const AttnCudaParams& p) {
  const int64_t total = load(p.schedule + p.attn.B) * (p.attn.G * p.row_groups);
  const int64_t share = block_share(total, gridDim.x, p.batch_invariant), begin = blockIdx.x * share;
  return {begin, begin + share < total ? begin + share : total, share, total};
}

// The piece at `at` of the row of all items, the same for all threads of the block. splits == 0: nothing to
// do before `next`.
__device__ __forceinline__ WorkPiece find_piece(const AttnCudaParams& p, int64_t at, const BlockWork& work) {
  const int64_t items = p.attn.G * p.row_groups;
  WorkPiece w;
  w.b = find_sequence(p, at, items);
  const int64_t first = load(p.schedule + w.b), cost = load(p.schedule + w.b + 1) - first;
  const int64_t item = cost > 0 ? (at - first * items) / cost : items;
  const int64_t start = first * items + item * cost, stop = start + cost;
  if (start < 0 || at < first * items || item >= items || stop > work.total) {  // no schedule at all
    w.splits = 0;
    w.next = work.end;
    return w;
  }
  w.g = int(item % p.attn.G);
  w.row_begin = int(item / p.attn.G) * p.rows;
  w.len = load(p.attn.seq_lens + w.b);
  const CellRange cells = visible_cells(w.len, p.attn.S, p.capacity, p.attn.window_left);
  int cell_begin, cell_end;
  if (p.batch_invariant) {
    w.next = at + 1;
    w.split = int(at - start);
    // A schedule of other lengths may ask for more than there is room for.
    w.splits = cost < p.max_splits ? int(cost) : p.max_splits;
    if (w.split >= w.splits) w.splits = 0;
    w.counter = w.b * items + item;
    w.slot0 = w.counter * p.max_splits;
    w.slot1 = w.slot0 + 1;
    w.slot_step = 1;
    cell_begin = (cells.begin / kFixedSplitCells + w.split) * kFixedSplitCells;
    cell_end = cell_begin + kFixedSplitCells;
  } else {
    const int64_t first_cell = start + kItemCostCells;  // where it stands in the row
    const int64_t from = at > first_cell ? at : first_cell, to = work.end < stop ? work.end : stop;
    w.next = to;
    const int64_t first_block = first_cell / work.share, last_block = (stop - 1) / work.share;
    w.splits = from < to ? int(last_block - first_block) + 1 : 0;
    w.split = int(from / work.share - first_block);
    // A block has at most two split items: one that it goes on with (slot 2 * block) and one that it starts.
    w.slot0 = 2 * first_block + 1;
    w.slot1 = 2 * (first_block + 1);
    w.slot_step = 2;
    w.counter = first_block;
    cell_begin = cells.begin + int(from - first_cell);
    cell_end = cells.begin + int(to - first_cell);
  }
  if (w.len < 0 || w.len > p.capacity) w.len = -1;
  const int len = w.len < 0 ? 0 : w.len;
  const int visible = int(first_seen_token(len, p.attn.S, p.attn.window_left));
  w.token_begin = cell_begin * kCellTokens > visible ? cell_begin * kCellTokens : visible;
  w.token_end = cell_end * kCellTokens < len ? cell_end * kCellTokens : len;
  if (w.token_end < w.token_begin) w.token_end = w.token_begin;
  return w;
}

// ---- rows and tokens ---------------------------------------------------------------------------

// Query row -> (s, h). Rows of one query token are neighbours.
struct QueryRow {
  int s, h;
};

__device__ __forceinline__ QueryRow query_row(const AttnCudaParams& p, int g, int row) {
  const int s = row / p.group;
  return {s, g * p.group + row - s * p.group};
}

// How many of an item's rows there are: the last group of rows may be smaller.
__device__ __forceinline__ int rows_of_piece(const AttnCudaParams& p, const WorkPiece& w) {
  const int rows = p.num_rows - w.row_begin;
  return rows < p.rows ? rows : p.rows;
}

// The tokens [begin, end) that a query row sees; none for padding and for rows beyond the last.
struct SeenTokens {
  int begin, end;
};

__device__ __forceinline__ SeenTokens seen_tokens(const AttnCudaParams& p, const WorkPiece& w, int row) {
  const int pos = w.len - int(p.attn.S) + query_row(p, w.g, row).s;
  if (row >= p.num_rows || pos < 0) return {0, 0};
  const int left = int(p.attn.window_left), right = int(p.attn.window_right);
  return {left >= 0 && pos > left ? pos - left : 0,
          right >= 0 && w.len - pos > right + 1 ? pos + right + 1 : w.len};
}

// Where a token lies, the same in all caches of a call.
struct TokenPlace {
  int64_t row;  // sequence or page; -1: nowhere
  int64_t slot;
};

__device__ __forceinline__ TokenPlace find_token(const AttnCudaParams& p, const WorkPiece& w, int t,
                                                 bool* bad) {
  if (t < w.token_begin || t >= w.token_end) return {-1, 0};
  if (!p.attn.block_table) return {w.b, t};
  const int page_size = int(p.attn.page_size);
  const int page = load(p.attn.block_table + w.b * p.attn.block_table_stride + t / page_size);
  if (page < 0 || page >= p.num_pages) {
    *bad = true;
    return {-1, 0};
  }
  return {page, t % page_size};
}

template <typename T>
__device__ __forceinline__ const T* token_data(const CacheTensor& cache, int g, TokenPlace place) {
  return static_cast<const T*>(cache.data) + place.row * cache.stride_b + place.slot * cache.stride_t +
         g * cache.stride_g;
}

// ---- finishing a piece -------------------------------------------------------------------------

// out = sum_k 2^(lse_k - lse) out_k over the splits k in their order: the order, not the block that happens
// to do it, makes the bits. First each row's maximum and sum, a warp for a row; then its channels, four to a
// thread, with several splits under way.
template <typename T>
__device__ void merge_splits(const AttnCudaParams& p, const WorkPiece& w, int threads) {
  const AttnDecodeParams& a = p.attn;
  const int rows = rows_of_piece(p, w), lane = threadIdx.x % 32;
  const uint32_t maxima = shared_base(), sums = maxima + rows * 4;
  const auto lse = [&](int k, int r) { return load(a.partial_lse + w.slot(k) * p.slot_rows + r); };
  for (int r = threadIdx.x / 32; r < rows; r += threads / 32) {
    float highest = minus_infinity();
    for (int k = lane; k < w.splits; k += 32) highest = fmaxf(highest, lse(k, r));
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, apart));
    const float base = highest == minus_infinity() ? 0.f : highest;
    float sum = 0.f;
    for (int k = lane; k < w.splits; k += 32) sum += exp2f(lse(k, r) - base);
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
    if (lane == 0) {
      ptx::st_shared_f32(maxima + r * 4, base);
      ptx::st_shared_f32(sums + r * 4, sum);
      const QueryRow row = query_row(p, w.g, w.row_begin + r);
      store(a.lse + (w.b * a.H + row.h) * a.S + row.s,
            sum == 0.f ? minus_infinity() : (base + log2f(sum)) * kLn2);
    }
  }
  __syncthreads();
  const int quads = int(a.Dv) / 4;
  for (int i = threadIdx.x; i < rows * quads; i += threads) {
    const int r = i / quads, d = (i - r * quads) * 4;
    const float base = ptx::ld_shared_f32(maxima + r * 4), sum = ptx::ld_shared_f32(sums + r * 4);
    float out[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (int k = 0; k < w.splits; ++k) {
      const float weight = exp2f(lse(k, r) - base);
      const float4 x =
          load(reinterpret_cast<const float4*>(a.partial_out + (w.slot(k) * p.slot_rows + r) * a.Dv + d));
      out[0] += weight * x.x, out[1] += weight * x.y, out[2] += weight * x.z, out[3] += weight * x.w;
    }
    const QueryRow row = query_row(p, w.g, w.row_begin + r);
    T* to = static_cast<T*>(a.out) + ((w.b * a.S + row.s) * a.H + row.h) * a.Dv + d;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      T narrowed;
      narrow(sum == 0.f ? 0.f : out[c] / sum, &narrowed);
      store(to + c, narrowed);
    }
  }
}

// Writes element (row r, channel d) of a piece: `out` is normalised, `lse` in the log2 domain.
template <typename T>
__device__ __forceinline__ void write_result(const AttnCudaParams& p, const WorkPiece& w, int r, int d,
                                             float out, float lse) {
  const AttnDecodeParams& a = p.attn;
  if (w.splits == 1) {
    const QueryRow row = query_row(p, w.g, w.row_begin + r);
    T narrowed;
    narrow(out, &narrowed);
    store(static_cast<T*>(a.out) + ((w.b * a.S + row.s) * a.H + row.h) * a.Dv + d, narrowed);
    if (d == 0) store(a.lse + (w.b * a.H + row.h) * a.S + row.s, lse * kLn2);
  } else {
    const int64_t at = w.slot(w.split) * p.slot_rows + r;
    store(a.partial_out + at * a.Dv + d, out);
    if (d == 0) store(a.partial_lse + at, lse);
  }
}

// After all threads of the block have called write_result for their elements: the block that finishes an item
// last merges it. `flag` is a word of shared memory.
template <typename T>
__device__ __forceinline__ void finish_piece(const AttnCudaParams& p, const WorkPiece& w, uint32_t flag,
                                             int threads) {
  if (w.splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = ptx::atom_add_acq_rel(p.counters + w.counter, 1) == w.splits - 1;
    if (last) store(p.counters + w.counter, 0);  // as the next call expects it
    ptx::st_shared_b32(flag, last);
  }
  __syncthreads();
  if (ptx::ld_shared_b32(flag)) merge_splits<T>(p, w, threads);
}

// Merges the states of several warps (or parts of warps) of a block into the result of its piece. Shared
// memory holds, at `maxima` and `sums`, (states, rows) floats in the log2 domain and, at `outs`, (states,
// rows, pitch) floats that are relative to their maximum and not normalised; then a word for finish_piece.
struct BlockStates {
  uint32_t maxima, sums, outs, flag;
  int states, rows, pitch;
};

__device__ __forceinline__ BlockStates block_states(uint32_t base, int states, int rows, int pitch) {
  const uint32_t size = states * rows * 4;
  return {base, base + size, base + 2 * size, base + 2 * size + size * pitch, states, rows, pitch};
}

template <typename T>
__device__ __forceinline__ void merge_states(const AttnCudaParams& p, const WorkPiece& w,
                                             const BlockStates& s, int threads) {
  const int Dv = int(p.attn.Dv), rows = rows_of_piece(p, w);
  for (int i = threadIdx.x; i < rows * Dv; i += threads) {
    const int r = i / Dv, d = i % Dv;
    float highest = minus_infinity();
    for (int k = 0; k < s.states; ++k)
      highest = fmaxf(highest, ptx::ld_shared_f32(s.maxima + (k * s.rows + r) * 4));
    const float base = highest == minus_infinity() ? 0.f : highest;
    float out = 0.f, sum = 0.f;
    for (int k = 0; k < s.states; ++k) {
      const float weight = exp2f(ptx::ld_shared_f32(s.maxima + (k * s.rows + r) * 4) - base);
      sum += weight * ptx::ld_shared_f32(s.sums + (k * s.rows + r) * 4);
      out += weight * ptx::ld_shared_f32(s.outs + ((k * s.rows + r) * s.pitch + d) * 4);
    }
    write_result<T>(p, w, r, d, sum == 0.f ? 0.f : out / sum,
                    sum == 0.f ? minus_infinity() : base + log2f(sum));
  }
}

}  // namespace fusedkv
