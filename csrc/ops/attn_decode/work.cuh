// What the decode kernels share: the sum of costs, a block's chunks, the places of tokens in caches, and
// merging.
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

// ---- the running sum of costs -------------------------------------------------------------------

// The sum of x over the lanes up to and including this one.
__device__ __forceinline__ int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const int before = __shfl_sync(kFullWarp, x, lane >= apart ? lane - apart : lane);
    x += lane >= apart ? before : 0;
  }
  return x;
}

// The query tokens of a sequence, in q and in out.
struct Queries {
  int first, count;
};

// None for packed queries that are out of range: nothing of theirs is read or written.
__device__ __forceinline__ Queries find_queries(const int32_t* cu_seqlens_q, int64_t b, int64_t S,
                                                int64_t total_q) {
  if (!cu_seqlens_q) return {int(b * S), int(S)};
  const int first = load(cu_seqlens_q + b);
  const int64_t count = load(cu_seqlens_q + b + 1) - int64_t(first);
  const bool in_range = first >= 0 && count >= 0 && count <= S && first + count <= total_q;
  return {first, in_range ? int(count) : 0};
}

__device__ __forceinline__ int row_groups_of(int num_rows, int rows) {
  return (num_rows + rows - 1) / rows;
}

// Calls write(b, cost of all sequences before b) for b = 0 .. B. The threads of the block take one sequence
// each at a time; costs are summed within warps, then over the warps. `scratch` is a word per warp.
template <typename Write>
__device__ __forceinline__ void sum_costs(const SequenceCosts& c, int threads, uint32_t scratch,
                                          const Write& write) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;  // the cost of all sequences of earlier rounds
  for (int64_t round = 0; round < c.B; round += threads) {
    const int64_t b = round + threadIdx.x;
    int cost = 0;
    if (b < c.B) {
      const Queries queries = find_queries(c.cu_seqlens_q, b, c.S, c.total_q);
      cost = sequence_cost(visible_kv_tiles(load(c.seq_lens + b), queries.count, c.capacity, c.window_left),
                           c.batch_invariant);
      if (c.cu_seqlens_q) cost *= row_groups_of(queries.count * c.group, c.rows);
    }
    const int in_warp = inclusive_sum(cost);
    if (lane == 31) ptx::st_shared_b32(scratch + warp * 4, in_warp);
    __syncthreads();
    const int up_to_warp =
        inclusive_sum(lane < threads / 32 ? int(ptx::ld_shared_b32(scratch + lane * 4)) : 0);
    const int earlier_warps = __shfl_sync(kFullWarp, up_to_warp, warp == 0 ? 0 : warp - 1);
    if (b < c.B) write(b, before + in_warp - cost + (warp == 0 ? 0 : earlier_warps));
    before += __shfl_sync(kFullWarp, up_to_warp, 31);
    __syncthreads();  // all warps have read the sums
  }
  if (threadIdx.x == 0) write(c.B, before);
}

// Up to kMaxCopiedBatch sequences: the block's copy of the running sum.
__device__ __forceinline__ void copy_cost_sums(const AttnCudaParams& p, int threads) {
  const AttnDecodeParams& a = p.attn;
  if (a.B > kMaxCopiedBatch) return;
  const auto write = [&](int64_t b, int sum) {
    ptx::st_shared_b32(shared_base() + p.cost_sums + uint32_t(b) * 4, sum);
  };
  if (p.schedule) {
    for (int b = threadIdx.x; b <= a.B; b += threads) write(b, load(p.schedule + b));
  } else {
    sum_costs(sequence_costs(p), threads, shared_base(), write);
  }
  __syncthreads();
}

// The cost of the sequences before b, 0 <= b <= B.
__device__ __forceinline__ int cost_before(const AttnCudaParams& p, int b) {
  if (p.attn.B > kMaxCopiedBatch) return load(p.schedule + b);
  return int(ptx::ld_shared_b32(shared_base() + p.cost_sums + b * 4));
}

// ---- chunks ------------------------------------------------------------------------------------

// How often the cost of a sequence counts: once per KV head and, if it is that of one row group, per group.
__device__ __forceinline__ int units_per_cost(const AttnCudaParams& p) {
  return p.attn.cu_seqlens_q ? int(p.attn.G) : int(p.attn.G) * p.row_groups;
}

// This block's range of the row of all work units, whose total cost is `total`.
struct BlockWork {
  int64_t begin, end, quota, total;
};

// Comes first in every kernel: what it reads may be written by the kernel before it (gpu.cuh:
// launch_overlapped).
__device__ __forceinline__ BlockWork begin_block(const AttnCudaParams& p, int threads) {
  ptx::grid_dependency_wait();
  copy_cost_sums(p, threads);
  const int64_t total = int64_t(cost_before(p, int(p.attn.B))) * units_per_cost(p);
  const int64_t quota = block_quota(total, gridDim.x, p.batch_invariant), begin = blockIdx.x * quota;
  return {begin, begin + quota < total ? begin + quota : total, quota, total};
}

// One block's part of a work unit (schedule.h): split `split` of `splits`. Each split has a slot for its
// partial result.
struct WorkChunk {
  int b, g, row_begin;  // sequence, KV head, first query row
  int num_rows;         // query rows per KV head of the sequence
  Queries queries;
  int len;                      // valid tokens; -1: out of range, the output is NaN
  int token_begin, token_end;   // tokens of the chunk; both 0 for an empty sequence
  int split, splits;            // splits == 0: nothing to do before `next`
  int slot0, slot1, slot_step;  // of split 0; of split 1; between further splits
  int counter;
  int64_t next;  // where the block continues

  __device__ int64_t slot(int k) const { return k == 0 ? slot0 : slot1 + (k - 1) * slot_step; }
};

// The sequence b with cost_before(b) * units <= at < cost_before(b + 1) * units, found by the lanes of a warp
// together.
__device__ __forceinline__ int find_sequence(const AttnCudaParams& p, int64_t at, int units) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = int(p.attn.B);
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool before = probe < high && int64_t(cost_before(p, probe)) * units <= at;
    low += (__popc(__ballot_sync(kFullWarp, before)) - 1) * step;
    high = low + step < high ? low + step : high;
  }
  return low < 0 ? 0 : low;
}

// How many quotas `cost` takes, the last one perhaps in part. Costs of a sequence fit 32 bits, and 32-bit
// division is several times faster.
__device__ __forceinline__ int quotas_of(int64_t cost, int64_t quota) {
  if (cost <= 0) return 0;
  return cost <= quota ? 1 : int((uint32_t(cost) + uint32_t(quota) - 1) / uint32_t(quota));
}

// The chunk at `at` of the row of all work units, the same for all threads of the block.
__device__ __forceinline__ WorkChunk find_chunk(const AttnCudaParams& p, int64_t at, const BlockWork& work) {
  WorkChunk w;
  w.b = find_sequence(p, at, units_per_cost(p));
  w.queries = find_queries(p.attn.cu_seqlens_q, w.b, p.attn.S, p.attn.total_q);
  w.num_rows = w.queries.count * p.group;
  w.len = load(p.attn.seq_lens + w.b);
  const int row_groups = row_groups_of(w.num_rows, p.rows), units = int(p.attn.G) * row_groups;
  const int sequence = cost_before(p, w.b);
  int cost = cost_before(p, w.b + 1) - sequence;
  if (p.attn.cu_seqlens_q) cost = row_groups > 0 ? cost / row_groups : 0;
  const int64_t begin = int64_t(sequence) * units_per_cost(p);
  const int64_t unit = cost > 0 ? (at - begin) / cost : units;
  const int64_t start = begin + unit * cost, stop = start + cost;
  // True for a schedule of another call.
  if (start < 0 || at < begin || unit >= units || stop > work.total) {
    w.splits = 0;
    w.next = work.end;
    return w;
  }
  w.g = int(unit) % int(p.attn.G);
  w.row_begin = int(unit) / int(p.attn.G) * p.rows;
  const KVTileRange tiles = visible_kv_tiles(w.len, w.queries.count, p.capacity, p.attn.window_left);
  int tile_begin, tile_end;
  if (p.batch_invariant) {
    w.next = at + 1;
    w.split = int(at - start);
    // A schedule of other lengths may want more splits than there are slots.
    w.splits = cost < p.max_splits ? cost : p.max_splits;
    if (w.split >= w.splits) w.splits = 0;
    w.counter = w.b * (int(p.attn.G) * p.row_groups) + int(unit);
    w.slot0 = w.counter * p.max_splits;
    w.slot1 = w.slot0 + 1;
    w.slot_step = 1;
    tile_begin = (tiles.begin / kFixedSplitTiles + w.split) * kFixedSplitTiles;
    tile_end = tile_begin + kFixedSplitTiles;
  } else {
    const int64_t first_tile = start + kUnitCostTiles;  // its place in the row
    const int64_t from = at > first_tile ? at : first_tile, to = work.end < stop ? work.end : stop;
    w.next = to;
    w.split = quotas_of(work.begin - first_tile, work.quota);  // the blocks before this one
    w.splits = from < to ? w.split + 1 + quotas_of(stop - work.end, work.quota) : 0;
    w.counter = int(blockIdx.x) - w.split;
    // A block has at most two split units: one that it continues (slot 2 * block) and one that it starts.
    w.slot0 = 2 * w.counter + 1;
    w.slot1 = 2 * w.counter + 2;
    w.slot_step = 2;
    tile_begin = tiles.begin + int(from - first_tile);
    tile_end = tiles.begin + int(to - first_tile);
  }
  if (w.len < 0 || w.len > p.capacity) w.len = -1;
  const int len = w.len < 0 ? 0 : w.len;
  const int visible = visible_to_any_row<int>(len, w.queries.count, int(p.attn.window_left)).begin;
  w.token_begin = tile_begin * kKVTileTokens > visible ? tile_begin * kKVTileTokens : visible;
  w.token_end = tile_end * kKVTileTokens < len ? tile_end * kKVTileTokens : len;
  if (w.token_end < w.token_begin) w.token_end = w.token_begin;
  return w;
}

// The block's next chunk with something to do, from `next` on. At the end splits, and all else, is 0.
__device__ __forceinline__ WorkChunk next_chunk(const AttnCudaParams& p, const BlockWork& work,
                                                int64_t next) {
  while (next < work.end) {
    const WorkChunk w = find_chunk(p, next, work);
    if (w.splits > 0) return w;
    next = w.next;
  }
  return {};
}

// ---- rows and tokens ---------------------------------------------------------------------------

// Query row -> (s, h). Rows of one query token are neighbors.
struct QueryRow {
  int s, h;
};

__device__ __forceinline__ QueryRow query_row(const AttnCudaParams& p, int g, int row) {
  const int s = divide(row, p.by_group);
  return {s, g * p.group + row - s * p.group};
}

// Query rows of a chunk: the last group of rows may be smaller.
__device__ __forceinline__ int rows_of_chunk(const AttnCudaParams& p, const WorkChunk& w) {
  const int rows = w.num_rows - w.row_begin;
  return rows < p.rows ? rows : p.rows;
}

// The tokens that a query row sees; none for rows beyond the last.
__device__ __forceinline__ TokenRangeOf<int> visible_tokens(const AttnCudaParams& p, const WorkChunk& w,
                                                            int row) {
  if (row >= w.num_rows) return {0, 0};
  const int position = w.len - w.queries.count + query_row(p, w.g, row).s;
  return visible_to_row(position, w.len, int(p.attn.window_left), int(p.attn.window_right));
}

// The score of a query row and a token in the natural domain, of their product: soft cap, then ALiBi. Only if
// adjusts_scores.
__device__ __forceinline__ float adjusted_score(const AttnCudaParams& p, const WorkChunk& w, int row,
                                                int token, float product) {
  const AttnDecodeParams& a = p.attn;
  float x = product * a.scale;
  if (a.softcap > 0.f) x = a.softcap * tanhf(x * a.inverse_softcap);
  if (a.alibi_slopes) {
    const QueryRow at = query_row(p, w.g, row);
    const int distance = w.len - w.queries.count + at.s - token;
    x -= load(a.alibi_slopes + w.b * a.alibi_stride_b + at.h) * fabsf(float(distance));
  }
  return x;
}

// The sink of a row, log2 domain: a score whose value is zero. Only if there are sinks.
__device__ __forceinline__ float sink_of(const AttnCudaParams& p, QueryRow row) {
  return load(p.attn.sinks + row.h) * kLog2e;
}

// log2(2^a + 2^b).
__device__ __forceinline__ float add_exp2(float a, float b) {
  if (b == minus_infinity()) return a;
  const float higher = a > b ? a : b, lower = a > b ? b : a;
  return higher + log2f(1.f + exp2f(lower - higher));
}

// The place of a token, the same in all caches of a call.
struct TokenPlace {
  int row;   // sequence or page, as it stands in the block table
  int slot;  // in it; negative: no token of the chunk
};

// Looks a token up. The page is not tested here but where it is used (exists), so that nothing waits for it.
__device__ __forceinline__ TokenPlace find_token(const AttnCudaParams& p, const WorkChunk& w, int t) {
  if (t < w.token_begin || t >= w.token_end) return {0, -1};
  if (!p.attn.block_table) return {w.b, t};
  const int page = divide(t, p.by_page_size);
  return {load(p.attn.block_table + w.b * p.attn.block_table_stride + page),
          t - page * int(p.attn.page_size)};
}

// Whether there is a token; `bad` if its page is out of range.
__device__ __forceinline__ bool exists(const AttnCudaParams& p, TokenPlace at, bool* bad) {
  const bool in_range = unsigned(at.row) < unsigned(p.cache_rows);
  *bad |= at.slot >= 0 && !in_range;
  return at.slot >= 0 && in_range;
}

template <typename T>
__device__ __forceinline__ const T* token_data(const CacheTensor& cache, int g, TokenPlace place) {
  return static_cast<const T*>(cache.data) + place.row * cache.stride_b + place.slot * cache.stride_t +
         g * cache.stride_g;
}

// ---- merging -----------------------------------------------------------------------------------

// Channels d .. d + N - 1 of a query row's result, rounded once.
template <typename T, int N>
__device__ __forceinline__ void store_output(const AttnCudaParams& p, const WorkChunk& w, QueryRow row, int d,
                                             const Vector<float, N>& x) {
  const AttnDecodeParams& a = p.attn;
  Vector<T, N> narrowed;
#pragma unroll
  for (int c = 0; c < N; ++c) narrow(x.element[c], &narrowed.element[c]);
  T* to = static_cast<T*>(a.out) + out_offset(a, w.queries.first, row.s, row.h) + d;
  store(reinterpret_cast<Vector<T, N>*>(to), narrowed);
}

constexpr int kMergedTogether = 8;  // splits whose loads are in flight together

// out = sum_k 2^(lse_k - lse) out_k over the splits k. A sink is one more term of lse. One warp per row, four
// channels per lane; with more warps than rows, several warps share a row's splits and add their sums in
// `scratch` (warps, 128 floats). The order of the sums depends on splits, rows and warps, not on the block
// that merges.
template <typename T>
__device__ void merge_splits(const AttnCudaParams& p, const WorkChunk& w, uint32_t scratch, int threads) {
  const AttnDecodeParams& a = p.attn;
  const int rows = rows_of_chunk(p, w), lane = threadIdx.x % 32, warp = threadIdx.x / 32,
            warps = threads / 32;
  const int parts = rows < warps ? warps / rows : 1, part = parts > 1 ? warp / rows : 0;
  const int last = w.splits - 1, Dv = int(a.Dv);
  for (int r = parts > 1 ? warp % rows : warp; r < rows; r += warps) {
    const auto lse = [&](int k) { return load(a.partial_lse + w.slot(k) * p.slot_rows + r); };
    const QueryRow row = query_row(p, w.g, w.row_begin + r);
    const float sink = a.sinks ? sink_of(p, row) : minus_infinity();
    float highest = sink;
    for (int k = lane; k < w.splits; k += 32) highest = fmaxf(highest, lse(k));
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, apart));
    const float base = highest == minus_infinity() ? 0.f : highest;
    float sum = 0.f;
    for (int k = lane; k < w.splits; k += 32) sum += exp2f(lse(k) - base);
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
    if (a.sinks) sum += exp2f(sink - base);

    for (int first = 0; first < Dv; first += 128) {
      const int d = first + lane * 4, existing = d < Dv ? d : 0;
      Vector<float, 4> out = {{0.f, 0.f, 0.f, 0.f}};
      // Warps beyond the last part have nothing to add.
      for (int k = part < parts ? part * kMergedTogether : w.splits; k < w.splits;
           k += parts * kMergedTogether) {
        const int own = k + lane % kMergedTogether;
        const float weight = exp2f(lse(own < last ? own : last) - base);
        Vector<float, 4> x[kMergedTogether];
#pragma unroll
        for (int i = 0; i < kMergedTogether; ++i) {
          const int64_t slot = w.slot(k + i < last ? k + i : last);
          x[i] = load(reinterpret_cast<const Vector<float, 4>*>(a.partial_out +
                                                                (slot * p.slot_rows + r) * Dv + existing));
        }
#pragma unroll
        for (int i = 0; i < kMergedTogether; ++i) {
          const float factor = __shfl_sync(kFullWarp, weight, i);
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (k + i <= last) out.element[c] += factor * x[i].element[c];
        }
      }
      if (parts > 1) {
        ptx::st_shared_b128(scratch + (warp * 32 + lane) * 16, bits_of(out));
        __syncthreads();
        for (int other = warp + rows; part == 0 && other < parts * rows; other += rows) {
          const Vector<float, 4> x = floats_of(ptx::ld_shared_b128(scratch + (other * 32 + lane) * 16));
#pragma unroll
          for (int c = 0; c < 4; ++c) out.element[c] += x.element[c];
        }
        __syncthreads();  // the next channels reuse it
      }
      if (part > 0 || d >= Dv) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) out.element[c] = sum == 0.f ? 0.f : out.element[c] / sum;
      store_output<T>(p, w, row, d, out);
    }
    if (part == 0 && lane == 0)
      store(a.lse + lse_offset(a, w.b, w.queries.first, row.s, row.h),
            sum == 0.f ? minus_infinity() : (base + log2f(sum)) * kLn2);
  }
}

// Writes channels d .. d + N - 1 of row r of a chunk. `out` and `sum`, its softmax sum, are relative to
// 2^base.
template <typename T, int N>
__device__ __forceinline__ void write_result(const AttnCudaParams& p, const WorkChunk& w, int r, int d,
                                             Vector<float, N> out, float sum, float base) {
  const AttnDecodeParams& a = p.attn;
  float lse = sum == 0.f ? minus_infinity() : base + log2f(sum);
  if (w.splits == 1 && a.sinks) {
    const float sink = sink_of(p, query_row(p, w.g, w.row_begin + r));
    lse = add_exp2(lse, sink);
    if (sink != minus_infinity()) sum += exp2f(sink - base);
  }
#pragma unroll
  for (int c = 0; c < N; ++c) out.element[c] = sum == 0.f ? 0.f : out.element[c] / sum;
  if (w.splits == 1) {
    const QueryRow row = query_row(p, w.g, w.row_begin + r);
    store_output<T>(p, w, row, d, out);
    if (d == 0) store(a.lse + lse_offset(a, w.b, w.queries.first, row.s, row.h), lse * kLn2);
  } else {
    const int64_t at = w.slot(w.split) * p.slot_rows + r;
    store(reinterpret_cast<Vector<float, N>*>(a.partial_out + at * a.Dv + d), out);
    if (d == 0) store(a.partial_lse + at, lse);
  }
}

// Comes after all threads of the block have called write_result for their elements. The block that finishes a
// work unit last merges it. `flag` is a word of shared memory, `scratch` is for merge_splits.
template <typename T>
__device__ __forceinline__ void finish_chunk(const AttnCudaParams& p, const WorkChunk& w, uint32_t flag,
                                             uint32_t scratch, int threads) {
  if (w.splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = ptx::atom_add_acq_rel(p.counters + w.counter, 1) == w.splits - 1;
    if (last) store(p.counters + w.counter, 0);  // for the next call
    ptx::st_shared_b32(flag, last);
  }
  __syncthreads();
  if (ptx::ld_shared_b32(flag)) merge_splits<T>(p, w, scratch, threads);
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
        const Vector<float, 4> x = floats_of(ptx::ld_shared_b128(s.outs + (at(k) * s.pitch + d) * 4));
#pragma unroll
        for (int c = 0; c < 4; ++c) out.element[c] += weight * x.element[c];
      }
      write_result<T>(p, w, r, d, out, sum, base);
    }
  }
}

}  // namespace fusedkv
