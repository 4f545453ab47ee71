// Attention of R query rows over keys and values fused from several layers, without a fused key or value ever
// existing:
//
//   s = sum_j (q (.) a_j) . K_j          the weights of the keys go into q before the loop over tokens
//   o = sum_j b_j (.) (softmax(s) V_j)   the weights of the values go into the output after it
//
// A task is one (sequence, split of kSplitTokens tokens, KV head, group of up to kMaxTaskRows rows). It walks
// the split in blocks of kBlock tokens that stay in L1 between the two products, reads each key and value
// once for all its rows (memory is what decode waits for), and keeps an online softmax per row in the log2
// domain. Splits are fixed, and a second pass merges them in their order: bits depend neither on threads nor
// on the rest of the batch.

#include "kernels/attn_decode.h"

#include "kernels/attn_decode_products.h"

namespace fusedkv {
namespace FUSEDKV_LEVEL {

namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;
constexpr int64_t kMaxHeadDim = 256;
inline float minus_infinity() {
  return -__builtin_inff();
}

alignas(64) const char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

// Where a task stands: its sequence, KV head, first row and tokens.
struct Task {
  int64_t b, g, row_begin, rows, split, splits;
  TokenRange tokens;
};

Task find_task(const AttnDecodeParams& p, int64_t index) {
  Task task;
  int64_t low = 0, high = p.B;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.task_offsets[middle] <= index ? low : high) = middle;
  }
  task.b = low;
  int64_t rest = index - p.task_offsets[low];
  task.g = rest % p.G;
  rest /= p.G;
  const int64_t group = rest % num_row_groups(p);
  task.row_begin = group * kMaxTaskRows;
  task.rows = num_rows(p) - task.row_begin < kMaxTaskRows ? num_rows(p) - task.row_begin : kMaxTaskRows;
  task.split = rest / num_row_groups(p);
  const int64_t len = p.seq_lens[low];
  const TokenRange all = visible_tokens(p, len);
  task.splits = num_splits(p, len);
  task.tokens.begin = all.begin + task.split * kSplitTokens;
  task.tokens.end = task.tokens.begin + kSplitTokens < all.end ? task.tokens.begin + kSplitTokens : all.end;
  return task;
}

// Query row -> (s, h). Rows of one query token are neighbours.
struct Row {
  int64_t s, h;
};

inline Row row_of(const AttnDecodeParams& p, int64_t g, int64_t row) {
  const int64_t group = p.H / p.G;
  return {row / group, g * group + row % group};
}

// The tokens that query token s of a sequence of length len sees.
TokenRange tokens_of_row(const AttnDecodeParams& p, int64_t len, int64_t s) {
  const int64_t pos = len - p.S + s;
  if (pos < 0) return {0, 0};
  const int64_t begin = p.window_left >= 0 && pos > p.window_left ? pos - p.window_left : 0;
  const int64_t end = p.window_right >= 0 && pos + p.window_right + 1 < len ? pos + p.window_right + 1 : len;
  return {begin, end};
}

template <typename T>
const T* token_row(const AttnDecodeParams& p, const CacheTensor& cache, int64_t b, int64_t g, int64_t t) {
  const T* base = (const T*)cache.data + g * cache.stride_g;
  if (!p.block_table) return base + b * cache.stride_b + t * cache.stride_t;
  const int64_t page = p.block_table[b * p.block_table_stride + t / p.page_size];
  return base + page * cache.stride_b + (t % p.page_size) * cache.stride_t;
}

// ---- one task -----------------------------------------------------------------------------------

// Scratch of one thread: fits L2 for the few sources and rows of decode.
template <typename P>
struct Scratch {
  typename P::Query* q;  // (num_keys, rows, Dp) q (.) a_j
  float* o;              // (num_values, rows, Dvp) softmax(s) V_j, not normalised
  float* s;              // (rows, kBlock) scores, then probabilities
  float* max;            // (rows) running maximum, log2 domain
  float* sum;            // (rows) running sum of exp2
  int64_t Dp, Dvp, rows;
};

template <typename P>
void fold_key_weights(const AttnDecodeParams& p, const Task& task, const Scratch<P>& w) {
  using T = typename P::Element;
  float folded[kMaxHeadDim + 32];
  for (int j = 0; j < p.num_keys; ++j) {
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int64_t d = 0; d < w.Dp; ++d) folded[d] = 0.f;
      if (r < task.rows) {
        const Row row = row_of(p, task.g, task.row_begin + r);
        const T* q = (const T*)p.q + task.b * p.q_stride_b + row.s * p.q_stride_s + row.h * p.q_stride_h;
        const float* a = p.key_weights ? p.key_weights + (j * p.G + task.g) * p.D : nullptr;
        for (int64_t d = 0; d < p.D; ++d) folded[d] = a ? widen(q[d]) * a[d] : widen(q[d]);
      }
      P::store_query(w.q + (j * w.rows + r) * w.Dp, folded, w.Dp);
    }
  }
}

// Scores of one row become probabilities relative to the running maximum; o is rescaled when the maximum
// grows.
template <typename P>
void softmax_row(const AttnDecodeParams& p, const Scratch<P>& w, int64_t r, TokenRange seen, int64_t block,
                 float scale) {
  float* s = w.s + r * kBlock;
  for (int i = 0; i < kBlock; i += kLanes) store(s + i, mul(load(s + i), set1(scale)));
  if (seen.begin > block || seen.end < block + kBlock)
    for (int i = 0; i < kBlock; ++i)
      if (block + i < seen.begin || block + i >= seen.end) s[i] = minus_infinity();

  Vec block_max = load(s);
  for (int i = kLanes; i < kBlock; i += kLanes) block_max = max(load(s + i), block_max);
  const float highest = reduce_max(block_max);
  const float old_max = w.max[r];
  const float new_max = highest > old_max ? highest : old_max;
  const float base = new_max == minus_infinity() ? 0.f : new_max;  // nothing seen yet: exp2(-inf - 0) = 0

  Vec block_sum = zero();
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec e = exp2(sub(load(s + i), set1(base)));
    store(s + i, e);
    block_sum = add(block_sum, e);
  }
  if (new_max > old_max) {
    const float shrink = old_max == minus_infinity() ? 0.f : reduce_max(exp2(set1(old_max - new_max)));
    w.sum[r] *= shrink;
    for (int j = 0; j < p.num_values; ++j) {
      float* o = w.o + (j * w.rows + r) * w.Dvp;
      for (int64_t d = 0; d < w.Dvp; d += kLanes) store(o + d, mul(load(o + d), set1(shrink)));
    }
  }
  w.sum[r] += reduce_add(block_sum);
  w.max[r] = new_max;
}

template <typename P, int RT>
void block_scores(const AttnDecodeParams& p, const Scratch<P>& w, int64_t r,
                  const typename P::Element* const (*k)[kBlock]) {
  P::template scores<RT>(w.s + r * kBlock, w.q + r * w.Dp, w.rows * w.Dp, w.Dp, k, p.num_keys, p.D);
}

template <typename P, int RT>
void block_values(const AttnDecodeParams& p, const Scratch<P>& w, int64_t r,
                  const typename P::Element* const (*v)[kBlock]) {
  for (int j = 0; j < p.num_values; ++j)
    P::template values<RT>(w.o + (j * w.rows + r) * w.Dvp, w.Dvp, w.s + r * kBlock, v[j], p.Dv);
}

// Rows go through the products in tiles of 8, 4, 2 or 1: as many as share a loaded key or value in registers.
template <typename Fn>
void for_row_tiles(int64_t rows, const Fn& fn) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) fn(r, TypeTag<char[8]>{});
  if (r + 4 <= rows) fn(r, TypeTag<char[4]>{}), r += 4;
  if (r + 2 <= rows) fn(r, TypeTag<char[2]>{}), r += 2;
  if (r + 1 <= rows) fn(r, TypeTag<char[1]>{}), r += 1;
}

// Where the rows of a block start, per source. Tokens past the end read zeros: their probability is 0, and 0
// times whatever the cache holds there might be NaN.
template <typename T>
void block_rows(const AttnDecodeParams& p, const CacheTensor* caches, int m, const Task& task, int64_t block,
                const T* (*rows)[kBlock]) {
  for (int j = 0; j < m; ++j) {
    const T* row = nullptr;
    int64_t neighbours = 0;  // tokens that follow at a fixed distance: to the end of a page, or all
    for (int i = 0; i < kBlock; ++i, row += caches[j].stride_t, --neighbours) {
      const int64_t t = block + i;
      if (t >= task.tokens.end) {
        rows[j][i] = (const T*)kZeroRow;
        continue;
      }
      if (neighbours == 0) {
        row = token_row<T>(p, caches[j], task.b, task.g, t);
        neighbours = p.block_table ? p.page_size - t % p.page_size : kBlock;
      }
      rows[j][i] = row;
    }
  }
}

// A head's rows of neighbouring tokens lie G * D elements apart, which no hardware prefetcher follows: ask a
// block ahead.
template <typename T>
void prefetch_rows(const T* const (*rows)[kBlock], int m, int64_t head_dim) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int j = 0; j < m; ++j)
    for (int i = 0; i < kBlock; ++i)
      for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(rows[j][i] + d, 0, 2);
}

template <typename P>
void run_blocks(const AttnDecodeParams& p, const Task& task, const Scratch<P>& w) {
  using T = typename P::Element;
  const int64_t len = p.seq_lens[task.b];
  const T* k[2][kMaxSources][kBlock];
  const T* v[2][kMaxSources][kBlock];
  block_rows(p, p.keys, p.num_keys, task, task.tokens.begin, k[0]);
  block_rows(p, p.values, p.num_values, task, task.tokens.begin, v[0]);
  int now = 0;
  for (int64_t block = task.tokens.begin; block < task.tokens.end; block += kBlock, now ^= 1) {
    block_rows(p, p.keys, p.num_keys, task, block + kBlock, k[now ^ 1]);
    block_rows(p, p.values, p.num_values, task, block + kBlock, v[now ^ 1]);
    prefetch_rows(k[now ^ 1], p.num_keys, p.D);
    for_row_tiles(w.rows, [&](int64_t r, auto tile) {
      block_scores<P, sizeof(typename decltype(tile)::type)>(p, w, r, k[now]);
    });
    prefetch_rows(v[now ^ 1], p.num_values, p.Dv);
    for (int64_t r = 0; r < task.rows; ++r) {
      TokenRange seen = tokens_of_row(p, len, row_of(p, task.g, task.row_begin + r).s);
      if (seen.end > task.tokens.end) seen.end = task.tokens.end;
      softmax_row(p, w, r, seen, block, p.scale * kLog2e);
    }
    for_row_tiles(w.rows, [&](int64_t r, auto tile) {
      block_values<P, sizeof(typename decltype(tile)::type)>(p, w, r, v[now]);
    });
  }
}

// out[d] = sum_j b_j[d] o_j[d] / sum, to the partials or, when the sequence has one split, to the output
// itself.
template <typename P>
void finish_task(const AttnDecodeParams& p, int64_t index, const Task& task, const Scratch<P>& w) {
  using T = typename P::Element;
  float out[kMaxHeadDim];
  for (int64_t r = 0; r < task.rows; ++r) {
    const bool empty = w.max[r] == minus_infinity() && w.sum[r] == 0.f;
    const float inverse = empty ? 0.f : 1.f / w.sum[r];
    for (int64_t d = 0; d < p.Dv; ++d) {
      float x = 0.f;
      for (int j = 0; j < p.num_values; ++j) {
        const float b = p.value_weights ? p.value_weights[(j * p.G + task.g) * p.Dv + d] : 1.f;
        x += b * (P::output(w.o + (j * w.rows + r) * w.Dvp, d) * inverse);
      }
      out[d] = empty ? 0.f : x;
    }
    const float lse = empty ? minus_infinity() : w.max[r] + __builtin_log2f(w.sum[r]);
    if (task.splits == 1) {
      const Row row = row_of(p, task.g, task.row_begin + r);
      T* target = (T*)p.out + ((task.b * p.S + row.s) * p.H + row.h) * p.Dv;
      for (int64_t d = 0; d < p.Dv; ++d) narrow(out[d], target + d);
      p.lse[(task.b * p.H + row.h) * p.S + row.s] = lse * kLn2;
    } else {
      const int64_t slot = index * task_rows(p) + r;
      __builtin_memcpy(p.partial_out + slot * p.Dv, out, size_t(p.Dv) * sizeof(float));
      p.partial_lse[slot] = lse;
    }
  }
}

template <typename P>
void decode(const AttnDecodeParams& p, int64_t begin, int64_t end) {
  const int64_t pad = P::kPad, rows = task_rows(p);
  const int64_t Dp = (p.D + pad - 1) / pad * pad, Dvp = (p.Dv + pad - 1) / pad * pad;
  const int64_t q_size = p.num_keys * rows * Dp, o_size = p.num_values * rows * Dvp, s_size = rows * kBlock;
  auto* memory = (char*)__builtin_malloc(size_t(q_size + o_size + s_size + 2 * rows) * sizeof(float) + 64);
  Scratch<P> w;
  w.o = (float*)(((uintptr_t)memory + 63) / 64 * 64);
  w.s = w.o + o_size;
  w.max = w.s + s_size;
  w.sum = w.max + rows;
  w.q = (typename P::Query*)(w.sum + rows);
  w.Dp = Dp;
  w.Dvp = Dvp;
  for (int64_t index = begin; index < end; ++index) {
    const Task task = find_task(p, index);
    w.rows = task.rows;
    fold_key_weights<P>(p, task, w);
    for (int64_t i = 0; i < p.num_values * w.rows * Dvp; ++i) w.o[i] = 0.f;
    for (int64_t r = 0; r < w.rows; ++r) w.max[r] = minus_infinity(), w.sum[r] = 0.f;
    run_blocks<P>(p, task, w);
    finish_task<P>(p, index, task, w);
  }
  __builtin_free(memory);
}

// ---- merge --------------------------------------------------------------------------------------

// out = sum_k 2^(lse_k - lse) out_k over the splits k in their order; a sequence without tokens gives 0 and
// -inf.
template <typename T>
void merge_row(const AttnDecodeParams& p, int64_t b, int64_t g, int64_t group, int64_t r, int64_t splits) {
  const Row row = row_of(p, g, group * kMaxTaskRows + r);
  const auto slot = [&](int64_t split) {
    return (p.task_offsets[b] + (split * num_row_groups(p) + group) * p.G + g) * task_rows(p) + r;
  };
  float highest = minus_infinity();
  for (int64_t k = 0; k < splits; ++k) {
    const float lse = p.partial_lse[slot(k)];
    highest = lse > highest ? lse : highest;
  }
  const float base = highest == minus_infinity() ? 0.f : highest;
  float out[kMaxHeadDim] = {}, sum = 0.f;
  for (int64_t k = 0; k < splits; ++k) {
    const float weight = __builtin_exp2f(p.partial_lse[slot(k)] - base);
    if (weight == 0.f) continue;
    sum += weight;
    const float* partial = p.partial_out + slot(k) * p.Dv;
    for (int64_t d = 0; d < p.Dv; ++d) out[d] += weight * partial[d];
  }
  T* target = (T*)p.out + ((b * p.S + row.s) * p.H + row.h) * p.Dv;
  for (int64_t d = 0; d < p.Dv; ++d) narrow(sum == 0.f ? 0.f : out[d] / sum, target + d);
  p.lse[(b * p.H + row.h) * p.S + row.s] =
      sum == 0.f ? minus_infinity() : (base + __builtin_log2f(sum)) * kLn2;
}

template <typename T>
void merge(const AttnDecodeParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t g = index % p.G, group = index / p.G % num_row_groups(p),
                  b = index / p.G / num_row_groups(p);
    const int64_t splits = num_splits(p, p.seq_lens[b]);
    if (splits == 1) continue;  // its tasks have written the output
    const int64_t rest = num_rows(p) - group * kMaxTaskRows;
    for (int64_t r = 0; r < (rest < kMaxTaskRows ? rest : kMaxTaskRows); ++r)
      merge_row<T>(p, b, g, group, r, splits);
  }
}

}  // namespace

void attn_decode(const AttnDecodeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return decode<Fp32Products<float>>(p, begin, end);
    case DType::f16:
      return decode<Fp32Products<f16>>(p, begin, end);
    case DType::bf16:
#if defined(__AVX512BF16__)
      return decode<Bf16Products>(p, begin, end);
#else
      return decode<Fp32Products<bf16>>(p, begin, end);
#endif
    case DType::f64:
      return;  // the API takes no float64 caches
  }
}

void attn_decode_merge(const AttnDecodeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return merge<float>(p, begin, end);
    case DType::f16:
      return merge<f16>(p, begin, end);
    case DType::bf16:
      return merge<bf16>(p, begin, end);
    case DType::f64:
      return;
  }
}

}  // namespace FUSEDKV_LEVEL
}  // namespace fusedkv
