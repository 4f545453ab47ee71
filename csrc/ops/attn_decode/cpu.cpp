// out[r] = sum_j b_j (.) (softmax_t(scale * sum_i (q_r (.) a_i) . K_i[t]) V_j[t])
//
// No fused key or value exists. Key weights are applied to q before the loop over tokens, value weights to
// the output after it.
//
// A task is one (sequence, split of kSplitTokens tokens, group of up to kMaxTaskRows rows, block of KV
// heads). It processes its split in blocks of kBlock tokens, and each block head by head. The heads of a
// token are adjacent, so that memory is read page by page. During a block the task prefetches the next one
// (Ahead); at its end, the beginning of the thread's next task.
//
// Memory-bound: each key and value is read once for all rows. An online softmax per row keeps the running
// maximum in the log2 domain. Splits are fixed, and a second pass merges them in their order. So the bits
// depend neither on the number of threads nor on the rest of the batch.

#include "ops/attn_decode/params.h"

#include "ops/attn_decode/cpu_bf16.h"
#include "ops/attn_decode/cpu_codes.h"
#include "ops/attn_decode/cpu_products.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

#if defined(FUSEDKV_AMX)
// From this many query rows on, tiles are faster than pairs.
constexpr int64_t kMinAmxRows = 2;
#endif

inline float minus_infinity() {
  return -__builtin_inff();
}

// The sequence, KV heads, rows and tokens of a task.
struct Task {
  int64_t b, head_begin, heads, row_group, rows, split, splits;
  QueryRange queries;
  int64_t sequence_rows;  // query rows per KV head of the sequence
  TokenRange tokens;
};

// The last b of 0 .. n - 1 with offset(b) <= index.
template <typename Offset>
int64_t find_offset(int64_t n, int64_t index, const Offset& offset) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offset(middle) <= index ? low : high) = middle;
  }
  return low;
}

Task find_task(const AttnDecodeParams& p, int64_t index) {
  Task task;
  const int64_t blocks = num_head_blocks(p);
  task.b = find_offset(p.B, index, [&](int64_t b) { return p.task_offsets[b] * blocks; });
  task.queries = queries_of(p, task.b);
  task.sequence_rows = num_rows(p, task.b);
  const int64_t row_groups = num_row_groups(p, task.b);
  int64_t rest = index - p.task_offsets[task.b] * blocks;
  task.head_begin = rest % blocks * p.task_heads;
  task.heads = p.G - task.head_begin < p.task_heads ? p.G - task.head_begin : p.task_heads;
  rest /= blocks;
  task.row_group = rest % row_groups;
  const int64_t rows = task.sequence_rows - task.row_group * kMaxTaskRows;
  task.rows = rows < kMaxTaskRows ? rows : kMaxTaskRows;
  task.split = rest / row_groups;
  const TokenRange all = visible_tokens(p, task.b);
  const int64_t grid = (all.begin / kSplitTokens + task.split) * kSplitTokens;
  task.splits = num_splits(p, task.b);
  task.tokens.begin = grid < all.begin ? all.begin : grid;
  task.tokens.end = grid + kSplitTokens < all.end ? grid + kSplitTokens : all.end;
  return task;
}

// Query row -> (s, h). Rows of one query token are adjacent.
struct Row {
  int64_t s, h;
};

inline Row row_of(const AttnDecodeParams& p, int64_t g, int64_t row) {
  const int64_t group = p.H / p.G;
  return {row / group, g * group + row % group};
}

// The slot of the partial result of a row of a KV head in a split.
inline int64_t partial_slot(const AttnDecodeParams& p, int64_t b, int64_t split, int64_t g, int64_t row) {
  return p.partial_offsets[b] + (split * p.G + g) * num_rows(p, b) + row;
}

// ---- one task -----------------------------------------------------------------------------------

// A thread's state of each KV head of its task, and scratch. It fits L2 for the few sources and rows of
// decoding.
template <typename P>
struct Scratch {
  typename P::Query* q;  // (heads, num_keys, rows * Dp) q (.) a_j, in the order of P
  float* o;              // (heads, num_values, rows, Dvp) softmax(s) V_j, not normalized
  float* max;            // (heads, rows) running maximum, log2 domain
  float* sum;            // (heads, rows, kLanes) running sums of exp2, to be added up
  float* s;              // (rows, kBlock) scores, then probabilities
  P* products;
  int64_t rows, Dp, Dvp;

  typename P::Query* query(const AttnDecodeParams& p, int64_t head) const {
    return q + head * p.num_keys * rows * Dp;
  }
  float* out(const AttnDecodeParams& p, int64_t head, int j) const {
    return o + (head * p.num_values + j) * rows * Dvp;
  }
};

// q (.) a_j without the softmax scale: without weights, q is then exact in bf16.
template <typename P>
void fold_key_weights(const AttnDecodeParams& p, const Task& task, const Scratch<P>& w, int64_t head) {
  using T = typename P::Element;
  const int64_t g = task.head_begin + head;
  alignas(64) float folded[kMaxHeadDim + 32] = {};
  for (int j = 0; j < p.num_keys; ++j) {
    const float* a = p.key_weights ? p.key_weights + (j * p.G + g) * p.D : nullptr;
    for (int64_t r = 0; r < w.rows; ++r) {
      const Row row = row_of(p, g, task.row_group * kMaxTaskRows + (r < task.rows ? r : 0));
      const T* q =
          (const T*)p.q + j * p.q_stride_source + query_offset(p, task.b, task.queries.first, row.s, row.h);
      for_lanes(p.D, [&](int64_t d, int n) {
        const Vec x = load(q + d, n);
        store(folded + d, a ? mul(load(a + d, n), x) : x);
      });
      w.products->store_query(w.query(p, head) + j * w.rows * w.Dp, r, w.rows, folded, w.Dp);
    }
  }
  if constexpr (P::kCoded) w.products->finish_queries(w.query(p, head), w.rows, p.num_keys, w.Dp);
}

// tanh with an error of a few roundings: its series for small x, where the other form would cancel.
inline void tanh_block(float* x) {
  alignas(64) float e[kBlock];
  for (int i = 0; i < kBlock; i += kLanes) store(e + i, exp2(mul(load(x + i), set1(2.f * kLog2e))));
  for (int i = 0; i < kBlock; ++i) {
    const float square = x[i] * x[i];
    float series = 21844.f / 6081075.f;
    series = series * square - 1382.f / 155925.f;
    series = series * square + 62.f / 2835.f;
    series = series * square - 17.f / 315.f;
    series = series * square + 2.f / 15.f;
    series = series * square - 1.f / 3.f;
    const float near_zero = x[i] + x[i] * square * series, elsewhere = 1.f - 2.f / (e[i] + 1.f);
    x[i] = square < 0.25f ? near_zero : elsewhere;
  }
}

// Products of one row with a block of tokens become scores, natural log: soft cap, then ALiBi.
inline void adjust_scores(const AttnDecodeParams& p, float* s, int64_t b, int64_t h, int64_t position,
                          int64_t block) {
  for (int i = 0; i < kBlock; ++i) s[i] *= p.scale;
  if (p.softcap > 0.f) {
    for (int i = 0; i < kBlock; ++i) s[i] *= p.inverse_softcap;
    tanh_block(s);
    for (int i = 0; i < kBlock; ++i) s[i] *= p.softcap;
  }
  if (p.alibi_slopes) {
    const float slope = alibi_slope(p, b, h);
    const int32_t ahead = int32_t(position - block);
    for (int i = 0; i < kBlock; ++i) s[i] -= slope * float(ahead > i ? ahead - i : i - ahead);
  }
}

// log2(2^a + 2^b).
inline float add_exp2(float a, float b) {
  if (b == minus_infinity()) return a;
  const float higher = a > b ? a : b, lower = a > b ? b : a;
  return higher + __builtin_log2f(1.f + __builtin_exp2f(lower - higher));
}

// The sink of a query head, log2 domain: a score of every row, whose value is zero.
inline float sink_of(const AttnDecodeParams& p, int64_t h) {
  return p.sinks ? p.sinks[h] * kLog2e : minus_infinity();
}

// Replaces the scores of one row of a block by probabilities relative to the running maximum. Rescales o when
// the maximum grows. `log2_scale`: of the scores, to the log2 domain.
template <typename P>
void softmax_row(const AttnDecodeParams& p, const Scratch<P>& w, int64_t head, int64_t r, TokenRange visible,
                 int64_t block, float log2_scale) {
  float* s = w.s + r * kBlock;
  const Vec scale = set1(log2_scale);
  for (int i = 0; i < kBlock; i += kLanes) store(s + i, mul(load(s + i), scale));
  if (visible.begin > block || visible.end < block + kBlock)
    for (int i = 0; i < kBlock; ++i)
      if (block + i < visible.begin || block + i >= visible.end) s[i] = minus_infinity();

  Vec block_max = load(s);
  for (int i = kLanes; i < kBlock; i += kLanes) block_max = max(load(s + i), block_max);
  const float highest = reduce_max(block_max);
  float* running_max = w.max + head * w.rows + r;
  float* running_sum = w.sum + (head * w.rows + r) * kLanes;
  const float old_max = *running_max;
  const float new_max = highest > old_max ? highest : old_max;
  const float base = new_max == minus_infinity() ? 0.f : new_max;  // nothing visible yet: exp2(-inf - 0) = 0

  Vec sum = load(running_sum);
  if (new_max > old_max) {
    const Vec rescale = old_max == minus_infinity() ? zero() : exp2(set1(old_max - new_max));
    sum = mul(sum, rescale);
    for (int j = 0; j < p.num_values; ++j) {
      float* o = w.out(p, head, j) + r * w.Dvp;
      for (int64_t d = 0; d < w.Dvp; d += kLanes) store(o + d, mul(load(o + d), rescale));
    }
  }
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec e = exp2(sub(load(s + i), set1(base)));
    store(s + i, e);
    sum = add(sum, e);
  }
  store(running_sum, sum);
  *running_max = new_max;
}

// The addresses of a block's tokens, per source, with elements of `size` bytes. Past the last token its
// address is repeated: the probability there is 0, and 0 times the cache's contents past the end could be
// NaN.
inline void block_rows(const AttnDecodeParams& p, const CacheTensor* caches, int m, int64_t size,
                       const Task& task, TokenRange block, BlockRows* rows) {
  for (int j = 0; j < m; ++j) {
    const CacheTensor& cache = caches[j];
    const int64_t stride_b = cache.stride_b * size, stride_t = cache.stride_t * size;
    const char* base = (const char*)cache.data + task.head_begin * cache.stride_g * size;
    if (!p.block_table) base += task.b * stride_b;
    const char* row = nullptr;
    int64_t run = 0;  // next tokens at a fixed distance: to the end of a page, or all
    for (int i = 0; i < kBlock; ++i) {
      const int64_t t = block.begin + i;
      if (t < block.end) {
        if (run == 0) {
          row = base + t * stride_t;
          run = kBlock;
          if (p.block_table) {
            const int64_t page = p.block_table[task.b * p.block_table_stride + t / p.page_size];
            row = base + page * stride_b + t % p.page_size * stride_t;
            run = p.page_size - t % p.page_size;
          }
        } else {
          row += stride_t;
        }
        --run;
      }
      rows[j].row[i] = row;
    }
  }
}

// A block has at most kBlock tokens and ends at a multiple of kBlock, so that it crosses few pages.
TokenRange block_at(const Task& task, int64_t begin) {
  const int64_t end = (begin / kBlock + 1) * kBlock;
  return {begin, end < task.tokens.end ? end : task.tokens.end};
}

// Bytes of an element of the caches of keys and of values.
struct ElementBytes {
  int64_t key, value;
};

template <typename P>
ElementBytes element_bytes(const AttnDecodeParams& p) {
  if constexpr (P::kCoded) return {size_of(p.key_code, p.dtype), size_of(p.value_code, p.dtype)};
  return {sizeof(typename P::Element), sizeof(typename P::Element)};
}

template <typename P>
struct Block {
  TokenRange tokens;
  BlockRows k[kMaxSources], v[kMaxSources];
  BlockRows k_scales[P::kCoded ? kMaxSources : 1], v_scales[P::kCoded ? kMaxSources : 1];

  void find(const AttnDecodeParams& p, const Task& task, int64_t begin) {
    const ElementBytes size = element_bytes<P>(p);
    tokens = block_at(task, begin);
    block_rows(p, p.keys, p.num_keys, size.key, task, tokens, k);
    block_rows(p, p.values, p.num_values, size.value, task, tokens, v);
    if constexpr (P::kCoded) {
      if (p.key_scales) block_rows(p, p.key_scales, p.num_keys, sizeof(f16), task, tokens, k_scales);
      if (p.value_scales) block_rows(p, p.value_scales, p.num_values, sizeof(f16), task, tokens, v_scales);
    }
  }
};

template <typename P>
void add_values(const AttnDecodeParams& p, const Scratch<P>& w, int64_t head, int j, const BlockRows& v,
                Ahead& ahead) {
  float* o = w.out(p, head, j);
  const int64_t offset = head * p.values[j].stride_g;
  if constexpr (P::kCoded)
    w.products->values(o, w.s, w.rows, v, offset, ahead, p.Dv, w.Dvp, j);
  else
    w.products->values(o, w.s, w.rows, v, offset, ahead, p.Dv, w.Dvp);
}

// next_task: the thread's next task, or -1.
template <typename P>
void run_blocks(const AttnDecodeParams& p, const Task& task, int64_t next_task, const Scratch<P>& w) {
  const ElementBytes size = element_bytes<P>(p);
  const int64_t key_bytes = P::kCoded ? cache_elements(p.key_code, p.D) * size.key : p.D * size.key;
  const int64_t value_bytes = P::kCoded ? cache_elements(p.value_code, p.Dv) * size.value : p.Dv * size.value;
  const int64_t len = p.seq_lens[task.b];
  const bool adjusts = adjusts_scores(p);
  const float log2_scale = adjusts ? kLog2e : p.scale * kLog2e;
  Block<P> blocks[2];
  Block<P>*now = &blocks[0], *next = &blocks[1];
  int64_t offsets[kMaxSources];
  now->find(p, task, task.tokens.begin);
  while (now->tokens.begin < task.tokens.end) {
    const bool last = now->tokens.end == task.tokens.end;
    const Task next_owner = last && next_task >= 0 ? find_task(p, next_task) : task;
    next->find(p, next_owner, last && next_task >= 0 ? next_owner.tokens.begin : now->tokens.end);
    Ahead ahead;
    if (next->tokens.begin < next->tokens.end) {
      ahead.add(next->k[0].row, p.num_keys * kBlock, next_owner.heads * key_bytes);
      ahead.add(next->v[0].row, p.num_values * kBlock, next_owner.heads * value_bytes);
    }
    for (int64_t head = 0; head < task.heads; ++head) {
      for (int j = 0; j < p.num_keys; ++j) offsets[j] = head * p.keys[j].stride_g;
      if constexpr (P::kCoded) w.products->at(head, now->k_scales, now->v_scales);
      w.products->scores(w.s, w.query(p, head), w.rows, now->k, offsets, ahead, p.num_keys, p.D, w.Dp);
      for (int64_t r = 0; r < task.rows; ++r) {
        const int64_t row = task.row_group * kMaxTaskRows + r;
        const int64_t position = len - task.queries.count + row_of(p, 0, row).s;
        TokenRange visible = visible_to_row(position, len, p.window_left, p.window_right);
        if (visible.end > now->tokens.end) visible.end = now->tokens.end;
        if (adjusts) {
          const int64_t h = row_of(p, task.head_begin + head, row).h;
          adjust_scores(p, w.s + r * kBlock, task.b, h, position, now->tokens.begin);
        }
        softmax_row(p, w, head, r, visible, now->tokens.begin, log2_scale);
        ahead.bytes(P::softmax_bytes(p.num_keys, p.D, task.rows));
      }
      for (int j = 0; j < p.num_values; ++j) add_values(p, w, head, j, now->v[j], ahead);
    }
    if (last) break;
    Block<P>* done = now;
    now = next;
    next = done;
  }
}

// out[d] += share * bias[d]. share: of the softmax in all tokens, less than 1 with a sink.
inline void add_value_bias(const AttnDecodeParams& p, int64_t g, float share, float* out) {
  const float* bias = p.value_bias + g * p.Dv;
  for (int64_t d = 0; d < p.Dv; ++d) out[d] += share * bias[d];
}

// out[d] = sum_j b_j[d] o_j[d] / sum. With one split per sequence this is the output, otherwise a partial
// result.
template <typename P>
void finish_head(const AttnDecodeParams& p, const Task& task, const Scratch<P>& w, int64_t head) {
  using T = typename P::Element;
  const int64_t g = task.head_begin + head;
  alignas(64) float out[kMaxHeadDim + kLanes];
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t row = task.row_group * kMaxTaskRows + r;
    const float highest = w.max[head * w.rows + r],
                sum = reduce_add(load(w.sum + (head * w.rows + r) * kLanes));
    const bool empty = highest == minus_infinity() && sum == 0.f;
    // With several splits the sink is added when they are merged.
    const float sink = task.splits == 1 ? sink_of(p, row_of(p, g, row).h) : minus_infinity();
    const float with_sink = sink == minus_infinity() ? sum : sum + __builtin_exp2f(sink - highest);
    const Vec inverse = set1(1.f / with_sink);
    for (int j = 0; j < p.num_values; ++j) {
      float* o = w.out(p, head, j) + r * w.Dvp;
      w.products->order_channels(o, w.Dvp);
      const float* b = p.value_weights ? p.value_weights + (j * p.G + g) * p.Dv : nullptr;
      for_lanes(p.Dv, [&](int64_t d, int n) {
        Vec x = mul(load(o + d), inverse);
        if (b) x = mul(load(b + d, n), x);
        store(out + d, j == 0 ? x : add(x, load(out + d)));
      });
    }
    if (p.value_bias && task.splits == 1) add_value_bias(p, g, sum / with_sink, out);
    // A fully masked row is 0, even where 0 times the values is not.
    if (empty) __builtin_memset(out, 0, sizeof(out));
    const float lse = add_exp2(empty ? minus_infinity() : highest + __builtin_log2f(sum), sink);
    if (task.splits == 1) {
      const Row at = row_of(p, g, row);
      T* target = (T*)p.out + out_offset(p, task.queries.first, at.s, at.h);
      for_lanes(p.Dv, [&](int64_t d, int n) { store(target + d, load(out + d), n); });
      p.lse[lse_offset(p, task.b, task.queries.first, at.s, at.h)] = lse * kLn2;
    } else {
      const int64_t slot = partial_slot(p, task.b, task.split, g, row);
      __builtin_memcpy(p.partial_out + slot * p.Dv, out, size_t(p.Dv) * sizeof(float));
      p.partial_lse[slot] = lse;
    }
  }
}

// Head dims of the scratch.
template <typename P>
void set_dims(const AttnDecodeParams& p, Scratch<P>* w) {
  if constexpr (P::kCoded) {
    w->Dp = w->products->key_dim();
    w->Dvp = w->products->value_dim();
  } else {
    w->Dp = (p.D + P::kPad - 1) / P::kPad * P::kPad;
    w->Dvp = (p.Dv + P::kPad - 1) / P::kPad * P::kPad;
  }
}

template <typename P>
P products_of(const AttnDecodeParams& p) {
  if constexpr (P::kCoded)
    return P(p);
  else
    return P{};
}

template <typename P>
void decode(const AttnDecodeParams& p, Task task, int64_t next_index, void* workspace) {
  P products = products_of<P>(p);
  Scratch<P> w;
  w.products = &products;
  w.rows = P::padded_rows(num_rows(p) < kMaxTaskRows ? num_rows(p) : kMaxTaskRows);
  set_dims(p, &w);
  w.o = (float*)workspace;
  w.sum = w.o + p.task_heads * p.num_values * w.rows * w.Dvp;
  w.s = w.sum + p.task_heads * w.rows * kLanes;
  w.max = w.s + w.rows * kBlock;
  w.q = (typename P::Query*)(w.max + p.task_heads * w.rows);
  w.rows = P::padded_rows(task.rows);
  P::begin_task(w.rows);
  for (int64_t head = 0; head < task.heads; ++head) fold_key_weights<P>(p, task, w, head);
  for (int64_t i = 0; i < task.heads * p.num_values * w.rows * w.Dvp; ++i) w.o[i] = 0.f;
  for (int64_t i = 0; i < task.heads * w.rows * kLanes; ++i) w.sum[i] = 0.f;
  for (int64_t i = 0; i < task.heads * w.rows; ++i) w.max[i] = minus_infinity();
  run_blocks<P>(p, task, next_index, w);
  for (int64_t head = 0; head < task.heads; ++head) finish_head<P>(p, task, w, head);
  P::end();
}

// ---- merge --------------------------------------------------------------------------------------

// out = sum_k 2^(lse_k - lse) out_k over the splits k in their order. The sink is one more term of lse. An
// empty sequence gives 0 and its sink, or -inf.
template <typename T>
void merge_row(const AttnDecodeParams& p, int64_t b, int64_t first, Row at, int64_t splits) {
  const int64_t group = p.H / p.G, g = at.h / group, row = at.s * group + at.h % group;
  const auto slot = [&](int64_t split) { return partial_slot(p, b, split, g, row); };
  const float sink = sink_of(p, at.h);
  float highest = sink;
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
  const float tokens = sum;
  sum += __builtin_exp2f(sink - base);
  if (p.value_bias && tokens != 0.f) add_value_bias(p, g, tokens, out);
  T* target = (T*)p.out + out_offset(p, first, at.s, at.h);
  for (int64_t d = 0; d < p.Dv; ++d) narrow(sum == 0.f ? 0.f : out[d] / sum, target + d);
  p.lse[lse_offset(p, b, first, at.s, at.h)] =
      sum == 0.f ? minus_infinity() : (base + __builtin_log2f(sum)) * kLn2;
}

template <typename T>
void merge(const AttnDecodeParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t token = index / p.H;
    const int64_t b = find_offset(p.B, token, [&](int64_t at) { return queries_of(p, at).first; });
    const int64_t first = queries_of(p, b).first, splits = num_splits(p, b);
    // A task has written the output of a single split.
    if (splits != 1) merge_row<T>(p, b, first, {token - first, index % p.H}, splits);
  }
}

}  // namespace

void attn_decode(const AttnDecodeParams& p, int64_t index, int64_t next_task, void* workspace) {
  const Task task = find_task(p, index);
  if (is_coded(p)) {
    if (p.dtype == DType::f32) return decode<CodedProducts<float>>(p, task, next_task, workspace);
    if (p.dtype == DType::f16) return decode<CodedProducts<f16>>(p, task, next_task, workspace);
    return decode<CodedProducts<bf16>>(p, task, next_task, workspace);
  }
  switch (p.dtype) {
    case DType::f32:
      return decode<Fp32Products<float>>(p, task, next_task, workspace);
    case DType::f16:
      return decode<Fp32Products<f16>>(p, task, next_task, workspace);
    case DType::bf16:
#if defined(FUSEDKV_AMX)
      if (task.sequence_rows >= kMinAmxRows && p.D % 32 == 0 && p.Dv % 32 == 0)
        return decode<AmxProducts>(p, task, next_task, workspace);
#endif
#if defined(__AVX512BF16__)
      return decode<Bf16Products>(p, task, next_task, workspace);
#elif defined(__AVX2__) && !defined(__AVX512F__)
      return decode<Bf16Words>(p, task, next_task, workspace);
#else
      return decode<Fp32Products<bf16>>(p, task, next_task, workspace);
#endif
    case DType::f64:
      return;  // the API refuses float64 caches
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

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
