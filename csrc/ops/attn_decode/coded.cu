// out[r] = sum_t p_rt (c + sum_j f'_jt b_j (.) w_j[t])
//                     with p_r = softmax_t(scale * sum_j f_jt (q_jr (.) a_j) . u_j[t])
//
// Over caches of codes: u and w are int8, e4m3, or 4-bit codes that stand for n - 8 or for the numbers of a
// codebook. f and f' are factors of tokens, c is a bias of the values, and each key source may have a query
// of its own. Raw caches come here too if a call has one of these.
//
// The block first writes q_jr (.) a_j of its rows into shared memory, so that key weights and queries per
// source cost nothing per token. A team takes four tokens at a time. It widens 8 channels per lane, once for
// all rows, and reads the queries once for the four tokens. The sums over the lanes transpose: each lane ends
// with the score of one row and one token, and computes its softmax alone.
//
// What a row does not see never reaches its result, whatever its codes and factors are.

#include "ops/attn_decode/team.cuh"

namespace fusedkv {

namespace {

constexpr int kRows = kTeamRows, kVec = kTeamVec;
constexpr int kTokens = 4;  // of a team at a time

// After sums over the lanes of a team, each lane has kPerLane of the kRows * kTokens numbers of rows and
// tokens.
template <typename T, int kD>
struct CodedKernel : TeamKernel<T, kD> {
  using TeamKernel<T, kD>::kLanes;
  static constexpr int kPerLane = kLanes < kRows * kTokens ? kRows * kTokens / kLanes : 1;

  // The number of row r and token i: in this lane of the team, its own number i % kPerLane.
  __device__ static int lane_of(int r, int i) {
    return (r >> 1) | (r & 1) << 1 | (i >> 1) << 2 | (kPerLane == 1 ? (i & 1) << 3 : 0);
  }
  __device__ static int row_of(int lane) { return (lane & 1) << 1 | (lane >> 1 & 1); }
  __device__ static int token_of(int lane, int k) {
    return (lane >> 2 & 1) << 1 | (kPerLane == 1 ? lane >> 3 & 1 : k);
  }
};

// Addresses of what the block keeps in shared memory, fp32 (CodedLayout). numbers: 0 without a codebook.
struct Shared {
  uint32_t numbers, value_weights, queries;
};

__device__ __forceinline__ void load_shared(float (&x)[kVec], uint32_t from) {
#pragma unroll
  for (int i = 0; i < kVec; i += 4) {
    const Vector<float, 4> four = floats_of(ptx::ld_shared_b128(from + i * 4));
#pragma unroll
    for (int c = 0; c < 4; ++c) x[i + c] = four.element[c];
  }
}

__device__ __forceinline__ void store_shared(uint32_t to, const float (&x)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i += 4)
    ptx::st_shared_b128(to + i * 4, bits_of(Vector<float, 4>{{x[i], x[i + 1], x[i + 2], x[i + 3]}}));
}

// ---- before the tokens --------------------------------------------------------------------------

// q_jr (.) a_j of row `row` of the chunk's sequence, channels d .. d + 7; zeros where there is no such row or
// channel.
template <typename K>
__device__ __forceinline__ void fold_query(float (&x)[kVec], const AttnCodedParams& p, const WorkChunk& w,
                                           int j, int row, int d) {
  const AttnDecodeParams& a = p.attn;
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = 0.f;
  if (row >= w.num_rows || d >= a.D) return;
  const QueryRow at = query_row(p, w.g, row);
  const auto* q = static_cast<const typename K::T*>(a.q) + j * a.q_stride_source +
                  query_offset(a, w.b, w.queries.first, at.s, at.h);
  load_channels(x, q + d, p.q_width == 16);
  if (!a.key_weights) return;
  const float* weights = a.key_weights + (int64_t(j) * a.G + w.g) * a.D + d;
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] *= load(weights + i);
}

// Each team writes one row of channels after the other. Of `count` sources, from `first` on.
template <typename K>
__device__ __forceinline__ void fill_queries(const AttnCodedParams& p, const WorkChunk& w, const Shared& s,
                                             int first, int count, int team, int d) {
#pragma unroll 1
  for (int i = team; i < count * kRows; i += K::kTeams) {
    float x[kVec];
    fold_query<K>(x, p, w, first + i / kRows, w.row_begin + i % kRows, d);
    store_shared(s.queries + (i * K::kD + d) * 4, x);
  }
}

template <typename K>
__device__ __forceinline__ void fill_shared(const AttnCodedParams& p, const WorkChunk& w, const Shared& s,
                                            int team, int d) {
  const AttnDecodeParams& a = p.attn;
  if (s.numbers && threadIdx.x < kCodebook)
    ptx::st_shared_f32(s.numbers + threadIdx.x * 4, load(a.codebook + threadIdx.x));
#pragma unroll 1
  for (int j = team; j <= a.num_values; j += K::kTeams) {
    const bool bias = j == a.num_values;
    const float* from = bias ? a.value_bias : a.value_weights;
    const int64_t row = bias ? w.g : int64_t(j) * a.G + w.g;
    float x[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      x[i] = d >= a.Dv ? 0.f : from ? load(from + row * a.Dv + d + i) : bias ? 0.f : 1.f;
    store_shared(s.value_weights + (j * K::kD + d) * 4, x);
  }
  if (p.shared.holds_queries) fill_queries<K>(p, w, s, 0, a.num_keys, team, d);
  __syncthreads();
}

// ---- tokens -------------------------------------------------------------------------------------

struct Tokens {
  TokenPlace place[kTokens];
  bool there[kTokens];
};

__device__ __forceinline__ Tokens find_tokens(const AttnCodedParams& p, const WorkChunk& w, int t,
                                              bool* bad) {
  Tokens tokens;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) tokens.place[i] = find_token(p, w, t + i);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) tokens.there[i] = exists(p, tokens.place[i], bad);
  return tokens;
}

// Token i of the team; slot < 0: it is not there.
__device__ __forceinline__ TokenPlace place_of(const Tokens& tokens, int i) {
  TokenPlace place = {0, -1};
#pragma unroll
  for (int n = 0; n < kTokens; ++n)
    if (n == i && tokens.there[n]) place = tokens.place[n];
  return place;
}

// The factor of a token for one source.
__device__ __forceinline__ float token_factor(const TokenFactors& f, int j, int g, TokenPlace place) {
  if (place.slot < 0) return 0.f;
  return widen(load(f.data[j] + int64_t(place.row) * f.stride_b[j] + int64_t(place.slot) * f.stride_t[j] +
                    int64_t(g) * f.stride_g[j]));
}

// One side of a call.
struct Side {
  CacheCode code;
  int D, width;  // head dim; bytes that a lane loads at once
};

__device__ __forceinline__ Side key_side(const AttnCodedParams& p) {
  return {p.attn.key_code, int(p.attn.D), p.key_width};
}

__device__ __forceinline__ Side value_side(const AttnCodedParams& p) {
  return {p.attn.value_code, int(p.attn.Dv), p.value_width};
}

// The bytes that hold the codes of channels d .. d + 7. Of two codes per byte, the half of channel d is in
// the first four bytes, that of channel d + 4 in the others.
__device__ __forceinline__ uint2 load_codes(const uint8_t* row, const Side& side, int d) {
  const int half = side.code == CacheCode::i4 ? side.D / 2 : side.D;
  const int first = d < half ? d : d - half, next = d + 4 < half ? d + 4 : d + 4 - half;
  if (side.width == 8) return load(reinterpret_cast<const uint2*>(row + first));
  if (side.width == 4)
    return {load(reinterpret_cast<const uint32_t*>(row + first)),
            load(reinterpret_cast<const uint32_t*>(row + next))};
  uint2 codes = {0, 0};
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    codes.x |= uint32_t(load(row + first + i)) << 8 * i;
    codes.y |= uint32_t(load(row + next + i)) << 8 * i;
  }
  return codes;
}

// 2^23 + byte k of x: the byte is the end of the mantissa.
__device__ __forceinline__ float biased_byte(uint32_t x, int k) {
  return __uint_as_float(ptx::prmt(x, 0x4b000000u, 0x7440u + k));
}

__device__ __forceinline__ void widen_int8(float* x, uint32_t codes) {
  const uint32_t shifted = codes ^ 0x80808080u;  // n + 128
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = biased_byte(shifted, k) - (8388608.f + 128.f);
}

// `numbers`: the address of the codebook, or 0.
__device__ __forceinline__ void widen_nibbles(float* x, uint32_t codes, uint32_t numbers) {
  if (numbers) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = ptx::ld_shared_f32(numbers + (codes >> 8 * k & 15) * 4);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = biased_byte(codes, k) - (8388608.f + 8.f);
  }
}

// The exponent and the mantissa of a code are those of a float that is smaller by 2^120, also of a subnormal.
__device__ __forceinline__ void widen_e4m3(float* x, uint32_t codes) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t top = ptx::prmt(codes, 0, 0x0444u | k << 12);
    x[k] = __uint_as_float(uint32_t(int32_t(top) >> 4) & 0x87f00000u) * 0x1p120f;
  }
  if (((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if ((codes >> 8 * k & 0x7f) == 0x7f) x[k] = not_a_number();
  }
}

// The numbers of the codes that load_codes has loaded. The code is the same for all threads of the block.
__device__ __forceinline__ void widen_codes(float (&x)[kVec], uint2 codes, const Side& side, uint32_t numbers,
                                            int d) {
  const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (side.code == CacheCode::i8) {
      widen_int8(x + 4 * i, words[i]);
    } else if (side.code == CacheCode::e4m3) {
      widen_e4m3(x + 4 * i, words[i]);
    } else {
      const int shift = d + 4 * i < side.D / 2 ? 0 : 4;
      widen_nibbles(x + 4 * i, words[i] >> shift & 0x0f0f0f0fu, numbers);
    }
  }
}

// What the lane has loaded of the team's tokens in one source, before it is used. Raw elements are loaded
// when they are used.
struct Loaded {
  uint2 codes[kTokens];
};

// The sources in the order of their use: keys, then values, then nothing.
__device__ __forceinline__ Loaded load_source(const AttnCodedParams& p, const Tokens& tokens, int source,
                                              int g, int d) {
  const AttnDecodeParams& a = p.attn;
  const bool keys = source < a.num_keys;
  const Side side = keys ? key_side(p) : value_side(p);
  const bool loads = side.code != CacheCode::raw && source < a.num_keys + a.num_values && d < side.D;
  Loaded loaded;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    loaded.codes[i] = {0, 0};
    if (!loads || !tokens.there[i]) continue;
    const CacheTensor& cache = keys ? a.keys[source] : a.values[source - a.num_keys];
    loaded.codes[i] = load_codes(token_data<uint8_t>(cache, g, tokens.place[i]), side, d);
  }
  return loaded;
}

// Channels d .. d + 7 of token i. A token that is not there is zeros, or the code of zero bits.
template <typename K>
__device__ __forceinline__ void widen_token(float (&x)[kVec], const Loaded& loaded, const Tokens& tokens,
                                            int i, const CacheTensor& cache, const Side& side,
                                            uint32_t numbers, int g, int d) {
  if (side.code != CacheCode::raw) return widen_codes(x, loaded.codes[i], side, numbers, d);
#pragma unroll
  for (int c = 0; c < kVec; ++c) x[c] = 0.f;
  if (tokens.there[i] && d < side.D)
    load_channels(x, token_data<typename K::T>(cache, g, tokens.place[i]) + d, side.width == 16);
}

// ---- scores -------------------------------------------------------------------------------------

// Adds x up over the lanes of the team. In every step a lane keeps one half of its numbers and gives the
// other half away, so that it ends with those of row_of and token_of.
template <int kLanes, int kStep = 1, int kLeft = kRows * kTokens>
__device__ __forceinline__ void sum_over_lanes(float (&x)[kRows * kTokens]) {
  if constexpr (kStep < kLanes && kLeft > 1) {
    constexpr int kHalf = kLeft / 2;
    const bool upper = threadIdx.x & kStep;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float gives = upper ? x[k] : x[k + kHalf], keeps = upper ? x[k + kHalf] : x[k];
      x[k] = keeps + __shfl_xor_sync(kFullWarp, gives, kStep);
    }
    sum_over_lanes<kLanes, 2 * kStep, kHalf>(x);
  } else if constexpr (kStep < kLanes) {
    x[0] += __shfl_xor_sync(kFullWarp, x[0], kStep);
    sum_over_lanes<kLanes, 2 * kStep, 1>(x);
  }
}

// The lane's own products of queries and keys, summed over the sources. With factors each source is summed
// over the lanes first: an infinite factor is one of the whole product.
template <typename K>
__device__ __forceinline__ void key_products(float (&own)[K::kPerLane], const AttnCodedParams& p,
                                             const WorkChunk& w, const Shared& s, const Tokens& tokens,
                                             Loaded& loaded, int d) {
  const AttnDecodeParams& a = p.attn;
  const bool factors = p.key_factors.data[0] != nullptr;
  const int rows = rows_of_chunk(p, w), lane = threadIdx.x % K::kLanes;
  float sums[kRows * kTokens];
#pragma unroll
  for (int i = 0; i < kRows * kTokens; ++i) sums[i] = 0.f;
#pragma unroll
  for (int k = 0; k < K::kPerLane; ++k) own[k] = 0.f;
#pragma unroll 1
  for (int j = 0; j < a.num_keys; ++j) {
    float u[kTokens][kVec];
    const Loaded next = load_source(p, tokens, j + 1, w.g, d);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      widen_token<K>(u[i], loaded, tokens, i, a.keys[j], key_side(p), s.numbers, w.g, d);
    loaded = next;
    if (!p.shared.holds_queries) {
      __syncthreads();
      fill_queries<K>(p, w, s, j, 1, threadIdx.x / K::kLanes, d);
      __syncthreads();
    }
    const uint32_t queries = s.queries + (p.shared.holds_queries ? j : 0) * (kRows * K::kD * 4) + d * 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      float q[kVec];
      load_shared(q, queries + r * K::kD * 4);
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int c = 0; c < kVec; ++c) sums[r * kTokens + i] += q[c] * u[i][c];
    }
    if (!factors && j + 1 < a.num_keys) continue;
    sum_over_lanes<K::kLanes>(sums);
#pragma unroll
    for (int k = 0; k < K::kPerLane; ++k) {
      const TokenPlace place = place_of(tokens, K::token_of(lane, k));
      own[k] = factors ? own[k] + token_factor(p.key_factors, j, w.g, place) * sums[k] : sums[k];
    }
#pragma unroll
    for (int i = 0; i < kRows * kTokens; ++i) sums[i] = 0.f;
  }
}

// The softmax of the lane's own row, of which it adds up its own tokens.
template <typename K>
struct Softmax {
  TokenRangeOf<int> visible;
  float max, sum;

  // Replaces the products of the lane's tokens, from t on, by probabilities relative to the maximum, or by -1
  // for a token that the row does not see. Returns what earlier results are multiplied with.
  __device__ __forceinline__ float update(float (&own)[K::kPerLane], const AttnCodedParams& p,
                                          const WorkChunk& w, const Tokens& tokens, int t) {
    const AttnDecodeParams& a = p.attn;
    const int lane = threadIdx.x % K::kLanes;
    const bool adjusts = adjusts_scores(a);
    bool sees[K::kPerLane];
    float highest = max;
#pragma unroll
    for (int k = 0; k < K::kPerLane; ++k) {
      const int i = K::token_of(lane, k), token = t + i;
      sees[k] = place_of(tokens, i).slot >= 0 && token >= visible.begin && token < visible.end;
      if (adjusts) own[k] = adjusted_score(p, w, w.row_begin + K::row_of(lane), token, own[k]);
      own[k] = sees[k] ? own[k] * (adjusts ? kLog2e : a.scale * kLog2e) : minus_infinity();
      highest = fmaxf(highest, own[k]);
    }
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 4));
    if (K::kPerLane == 1) highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 8));
    const float base = highest == minus_infinity() ? 0.f : highest, rescale = exp2f(max - base);
    max = highest;
    sum *= rescale;
#pragma unroll
    for (int k = 0; k < K::kPerLane; ++k) {
      own[k] = exp2f(own[k] - base);
      sum += own[k];
      if (!sees[k]) own[k] = -1.f;
    }
    return rescale;
  }
};

// ---- values -------------------------------------------------------------------------------------

// v = c + sum_j f_j b_j (.) w_j of the team's tokens.
template <typename K>
__device__ __forceinline__ void fuse_values(float (&v)[kTokens][kVec], const AttnCodedParams& p,
                                            const WorkChunk& w, const Shared& s, const Tokens& tokens,
                                            Loaded& loaded, int d) {
  const AttnDecodeParams& a = p.attn;
  const bool factors = p.value_factors.data[0] != nullptr;
  float weights[kVec];
  load_shared(weights, s.value_weights + (a.num_values * K::kD + d) * 4);
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
#pragma unroll
    for (int c = 0; c < kVec; ++c) v[i][c] = weights[c];
#pragma unroll 1
  for (int j = 0; j < a.num_values; ++j) {
    const Loaded next = load_source(p, tokens, a.num_keys + j + 1, w.g, d);
    load_shared(weights, s.value_weights + (j * K::kD + d) * 4);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float u[kVec];
      widen_token<K>(u, loaded, tokens, i, a.values[j], value_side(p), s.numbers, w.g, d);
      if (factors) {
        const float factor = token_factor(p.value_factors, j, w.g, place_of(tokens, i));
#pragma unroll
        for (int c = 0; c < kVec; ++c) u[c] *= factor;
      }
#pragma unroll
      for (int c = 0; c < kVec; ++c) v[i][c] += weights[c] * u[c];
    }
    loaded = next;
  }
}

template <typename K>
__device__ __forceinline__ void add_values(TeamState& state, const float (&own)[K::kPerLane], float rescale,
                                           const float (&v)[kTokens][kVec], int rows) {
  const bool rescales = __any_sync(kFullWarp, rescale != 1.f);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    if (rescales) {
      const float factor = __shfl_sync(kFullWarp, rescale, K::lane_of(r, 0), K::kLanes);
#pragma unroll
      for (int c = 0; c < kVec; ++c) state.o[r][c] *= factor;
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float e = __shfl_sync(kFullWarp, own[i % K::kPerLane], K::lane_of(r, i), K::kLanes);
      if (e < 0.f) continue;
#pragma unroll
      for (int c = 0; c < kVec; ++c) state.o[r][c] += e * v[i][c];
    }
  }
}

// ---- the chunk ----------------------------------------------------------------------------------

template <typename K>
__device__ __forceinline__ void run_tokens(const AttnCodedParams& p, const WorkChunk& w, TeamState& state,
                                           int team, int d) {
  const uint32_t base = shared_base();
  const uint32_t numbers = p.attn.codebook ? base + p.shared.numbers : 0;
  const Shared s = {numbers, base + p.shared.value_weights, base + p.shared.queries};
  fill_shared<K>(p, w, s, team, d);
  const int lane = threadIdx.x % K::kLanes, rows = rows_of_chunk(p, w);
  Softmax<K> softmax = {visible_tokens(p, w, w.row_begin + K::row_of(lane)), minus_infinity(), 0.f};
  // Later rows see later tokens.
  const int begin = visible_tokens(p, w, w.row_begin).begin;
  const int end = visible_tokens(p, w, w.row_begin + rows - 1).end;
  bool bad = false;
#pragma unroll 1
  for (int first = w.token_begin; first < w.token_end; first += K::kTeams * kTokens) {
    const int t = first + team * kTokens;
    const Tokens tokens = find_tokens(p, w, t, &bad);
    if (first + K::kTeams * kTokens <= begin || first >= end) continue;  // no row sees them
    float own[K::kPerLane], v[kTokens][kVec];
    Loaded loaded = load_source(p, tokens, 0, w.g, d);
    key_products<K>(own, p, w, s, tokens, loaded, d);
    const float rescale = softmax.update(own, p, w, tokens, t);
    fuse_values<K>(v, p, w, s, tokens, loaded, d);
    add_values<K>(state, own, rescale, v, rows);
  }
  softmax.sum += __shfl_xor_sync(kFullWarp, softmax.sum, 4);
  if (K::kPerLane == 1) softmax.sum += __shfl_xor_sync(kFullWarp, softmax.sum, 8);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state.max[r] = __shfl_sync(kFullWarp, softmax.max, K::lane_of(r, 0), K::kLanes);
    state.sum[r] = __shfl_sync(kFullWarp, softmax.sum, K::lane_of(r, 0), K::kLanes);
  }
  spoil_if(bad || w.len < 0, state);
}

template <typename K>
__global__ void __launch_bounds__(K::kThreads, 3)
    attn_decode_coded_kernel(const __grid_constant__ AttnCodedParams p) {
  run_chunks<K>(
      p, [&](const WorkChunk& w, TeamState& state, int team, int d) { run_tokens<K>(p, w, state, team, d); });
}

}  // namespace

template <typename T, int kD>
AttnCodedKernelFunction attn_coded_kernel() {
  return attn_decode_coded_kernel<CodedKernel<T, kD>>;
}

template AttnCodedKernelFunction attn_coded_kernel<FUSEDKV_UNIT>();

}  // namespace fusedkv
