// What the decode kernels share: a block's chunks, the places of tokens in caches, and merging.
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

// ---- chunks ------------------------------------------------------------------------------------

// One block's part of a work unit (schedule.h): split `split` of `splits`. Each split has a slot for its
// partial result.
struct WorkChunk {
  int b, g, row_begin;         // sequence, KV head, first query row
  int len;                     // valid tokens; -1: out of range, the output is NaN
  int token_begin, token_end;  // tokens of the chunk; both 0 for an empty sequence
  int split, splits;
  int64_t slot0, slot1, slot_step;  // of split 0; of split 1; between further splits
  int64_t counter;
  int64_t next;  // where the block continues

  __device__ int64_t slot(int k) const { return k == 0 ? slot0 : slot1 + (k - 1) * slot_step; }
};

// The sequence b with schedule[b] * units <= at < schedule[b + 1] * units, found by the lanes of a warp
// together.
__device__ __forceinline__ int find_sequence(const AttnCudaParams& p, int64_t at, int64_t units) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = int(p.attn.B);
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool before = probe < high && load(p.schedule + probe) * units <= at;
    low += (__popc(__ballot_sync(kFullWarp, before)) - 1) * step;
    high = low + step < high ? low + step : high;
  }
  return low < 0 ? 0 : low;
}

// This block's range of the row of all work units, whose total cost is `total`.
struct BlockWork {
  int64_t begin, end, quota, total;
};

__device__ __forceinline__ BlockWork block_work(const AttnCudaParams& p) {
  const int64_t total = load(p.schedule + p.attn.B) * (p.attn.G * p.row_groups);
  const int64_t quota = block_quota(total, gridDim.x, p.batch_invariant), begin = blockIdx.x * quota;
  return {begin, begin + quota < total ? begin + quota : total, quota, total};
}

// The chunk at `at` of the row of all work units, the same for all threads of the block. splits == 0: nothing
// to do before `next`.
__device__ __forceinline__ WorkChunk find_chunk(const AttnCudaParams& p, int64_t at, const BlockWork& work) {
  const int64_t units = p.attn.G * p.row_groups;
  WorkChunk w;
  w.b = find_sequence(p, at, units);
  const int64_t first = load(p.schedule + w.b), cost = load(p.schedule + w.b + 1) - first;
  const int64_t unit = cost > 0 ? (at - first * units) / cost : units;
  const int64_t start = first * units + unit * cost, stop = start + cost;
  // True for a schedule of another call.
  if (start < 0 || at < first * units || unit >= units || stop > work.total) {
    w.splits = 0;
    w.next = work.end;
    return w;
  }
  w.g = int(unit % p.attn.G);
  w.row_begin = int(unit / p.attn.G) * p.rows;
  w.len = load(p.attn.seq_lens + w.b);
  const KVTileRange tiles = visible_kv_tiles(w.len, p.attn.S, p.capacity, p.attn.window_left);
  int tile_begin, tile_end;
  if (p.batch_invariant) {
    w.next = at + 1;
    w.split = int(at - start);
    // A schedule of other lengths may want more splits than there are slots.
    w.splits = cost < p.max_splits ? int(cost) : p.max_splits;
    if (w.split >= w.splits) w.splits = 0;
    w.counter = w.b * units + unit;
    w.slot0 = w.counter * p.max_splits;
    w.slot1 = w.slot0 + 1;
    w.slot_step = 1;
    tile_begin = (tiles.begin / kFixedSplitTiles + w.split) * kFixedSplitTiles;
    tile_end = tile_begin + kFixedSplitTiles;
  } else {
    const int64_t first_tile = start + kUnitCostTiles;  // its place in the row
    const int64_t from = at > first_tile ? at : first_tile, to = work.end < stop ? work.end : stop;
    w.next = to;
    const int64_t first_block = first_tile / work.quota, last_block = (stop - 1) / work.quota;
    w.splits = from < to ? int(last_block - first_block) + 1 : 0;
    w.split = int(from / work.quota - first_block);
    // A block has at most two split units: one that it continues (slot 2 * block) and one that it starts.
    w.slot0 = 2 * first_block + 1;
    w.slot1 = 2 * (first_block + 1);
    w.slot_step = 2;
    w.counter = first_block;
    tile_begin = tiles.begin + int(from - first_tile);
    tile_end = tiles.begin + int(to - first_tile);
  }
  if (w.len < 0 || w.len > p.capacity) w.len = -1;
  const int len = w.len < 0 ? 0 : w.len;
  const int visible = int(visible_to_any_row<int64_t>(len, p.attn.S, p.attn.window_left).begin);
  w.token_begin = tile_begin * kKVTileTokens > visible ? tile_begin * kKVTileTokens : visible;
  w.token_end = tile_end * kKVTileTokens < len ? tile_end * kKVTileTokens : len;
  if (w.token_end < w.token_begin) w.token_end = w.token_begin;
  return w;
}

// ---- rows and tokens ---------------------------------------------------------------------------

// Query row -> (s, h). Rows of one query token are neighbors.
struct QueryRow {
  int s, h;
};

__device__ __forceinline__ QueryRow query_row(const AttnCudaParams& p, int g, int row) {
  const int s = row / p.group;
  return {s, g * p.group + row - s * p.group};
}

// Query rows of a chunk: the last group of rows may be smaller.
__device__ __forceinline__ int rows_of_chunk(const AttnCudaParams& p, const WorkChunk& w) {
  const int rows = p.num_rows - w.row_begin;
  return rows < p.rows ? rows : p.rows;
}

// The tokens that a query row sees; none for rows beyond the last.
__device__ __forceinline__ TokenRangeOf<int> visible_tokens(const AttnCudaParams& p, const WorkChunk& w,
                                                            int row) {
  if (row >= p.num_rows) return {0, 0};
  const int position = w.len - int(p.attn.S) + query_row(p, w.g, row).s;
  return visible_to_row(position, w.len, int(p.attn.window_left), int(p.attn.window_right));
}

// The place of a token, the same in all caches of a call.
struct TokenPlace {
  int64_t row;  // sequence or page; -1: none
  int64_t slot;
};

__device__ __forceinline__ TokenPlace find_token(const AttnCudaParams& p, const WorkChunk& w, int t,
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

// ---- merging -----------------------------------------------------------------------------------

// out = sum_k 2^(lse_k - lse) out_k over the splits k in their order. The bits depend on that order, not on
// the block that merges. First each row's maximum and sum, one warp per row. Then its channels, four per
// thread, with the loads of several splits in flight.
template <typename T>
__device__ void merge_splits(const AttnCudaParams& p, const WorkChunk& w, int threads) {
  const AttnDecodeParams& a = p.attn;
  const int rows = rows_of_chunk(p, w), lane = threadIdx.x % 32;
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
    Vector<T, 4> narrowed;
#pragma unroll
    for (int c = 0; c < 4; ++c) narrow(sum == 0.f ? 0.f : out[c] / sum, &narrowed.element[c]);
    store(reinterpret_cast<Vector<T, 4>*>(to), narrowed);
  }
}

// Writes channels d .. d + N - 1 of row r of a chunk: `out` is normalized, `lse` in the log2 domain.
template <typename T, int N>
__device__ __forceinline__ void write_result(const AttnCudaParams& p, const WorkChunk& w, int r, int d,
                                             const Vector<float, N>& out, float lse) {
  const AttnDecodeParams& a = p.attn;
  if (w.splits == 1) {
    const QueryRow row = query_row(p, w.g, w.row_begin + r);
    T* to = static_cast<T*>(a.out) + ((w.b * a.S + row.s) * a.H + row.h) * a.Dv + d;
    Vector<T, N> narrowed;
#pragma unroll
    for (int c = 0; c < N; ++c) narrow(out.element[c], &narrowed.element[c]);
    store(reinterpret_cast<Vector<T, N>*>(to), narrowed);
    if (d == 0) store(a.lse + (w.b * a.H + row.h) * a.S + row.s, lse * kLn2);
  } else {
    const int64_t at = w.slot(w.split) * p.slot_rows + r;
    store(reinterpret_cast<Vector<float, N>*>(a.partial_out + at * a.Dv + d), out);
    if (d == 0) store(a.partial_lse + at, lse);
  }
}

// Comes after all threads of the block have called write_result for their elements. The block that finishes a
// work unit last merges it. `flag` is a word of shared memory.
template <typename T>
__device__ __forceinline__ void finish_chunk(const AttnCudaParams& p, const WorkChunk& w, uint32_t flag,
                                             int threads) {
  if (w.splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = ptx::atom_add_acq_rel(p.counters + w.counter, 1) == w.splits - 1;
    if (last) store(p.counters + w.counter, 0);  // for the next call
    ptx::st_shared_b32(flag, last);
  }
  __syncthreads();
  if (ptx::ld_shared_b32(flag)) merge_splits<T>(p, w, threads);
}

// The softmax states of several warps, or teams of lanes, of a block in shared memory. `maxima` and `sums`
// are (states, rows) floats in the log2 domain. `outs` are (states, rows, pitch) floats, relative to their
// maximum and not normalized; rows begin at multiples of 16 bytes. `flag` is a word for finish_chunk.
struct BlockStates {
  uint32_t maxima, sums, outs, flag;
  int states, rows, pitch;
};

__device__ __forceinline__ BlockStates block_states(uint32_t base, int states, int rows, int pitch) {
  const uint32_t size = states * rows * 4;
  return {base, base + size, base + 2 * size, base + 2 * size + size * pitch, states, rows, pitch};
}

// Merges the states into the result of the block's chunk: one warp per row, four channels per lane.
template <typename T>
__device__ __forceinline__ void merge_states(const AttnCudaParams& p, const WorkChunk& w,
                                             const BlockStates& s, int threads) {
  const int Dv = int(p.attn.Dv), rows = rows_of_chunk(p, w);
  for (int r = threadIdx.x / 32; r < rows; r += threads / 32) {
    const auto at = [&](int k) { return k * s.rows + r; };
    float highest = minus_infinity();
#pragma unroll 4
    for (int k = 0; k < s.states; ++k) highest = fmaxf(highest, ptx::ld_shared_f32(s.maxima + at(k) * 4));
    const float base = highest == minus_infinity() ? 0.f : highest;
    for (int d = threadIdx.x % 32 * 4; d < Dv; d += 128) {
      Vector<float, 4> out = {{0.f, 0.f, 0.f, 0.f}};
      float sum = 0.f;
#pragma unroll 4
      for (int k = 0; k < s.states; ++k) {
        const float weight = exp2f(ptx::ld_shared_f32(s.maxima + at(k) * 4) - base);
        sum += weight * ptx::ld_shared_f32(s.sums + at(k) * 4);
        const uint4 x = ptx::ld_shared_b128(s.outs + (at(k) * s.pitch + d) * 4);
        out.element[0] += weight * __uint_as_float(x.x), out.element[1] += weight * __uint_as_float(x.y);
        out.element[2] += weight * __uint_as_float(x.z), out.element[3] += weight * __uint_as_float(x.w);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) out.element[c] = sum == 0.f ? 0.f : out.element[c] / sum;
      write_result<T>(p, w, r, d, out, sum == 0.f ? minus_infinity() : base + log2f(sum));
    }
  }
}

}  // namespace fusedkv
