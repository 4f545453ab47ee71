// out[r] = sum_j b_j (.) (softmax_t(scale * sum_i (q_r (.) a_i) . K_i[t]) V_j[t])    for up to 8 query rows.
//
// Memory-bound: each key and value is read once for all rows of its KV head, and the tiling keeps bytes in
// flight. Tokens are on M and query rows on N of mma.m16n8k16, so that rows are padded to 8 only. Sources
// concatenate along k: one accumulator sums the scores of all sources, and no fused key exists.
//
//   S^T (16 tokens x 8 rows)  += K_i (16 x 16) (q (.) a_i)^T       K by ldmatrix, queries in registers
//   P^T                        = 2^(S^T - max)                     fp32, a C fragment; movmatrix makes it a B
//   O_j^T (16 channels x 8)   += V_j^T (16 x 16 tokens) P^T        V by ldmatrix.trans, O in registers
//
// Warps are independent. Each has 16 tokens at a time, its own cp.async ring of two stages and its own
// softmax state; the warps of a block synchronize only at the end of a chunk. A stage's keys and values are
// separate, so that the copy of step i + 2's keys starts as soon as step i's scores are done:
//
//   wait V_i-1, K_i | scores i | copy V_i+1, K_i+2 | softmax | wait V_i, K_i+1 | values i
//
// There is one block per SM, with as many warps as shared memory holds (layout.h): few chunks, few splits to
// merge. States are merged outside the rings. A warp that is done fills its ring for the next chunk, and
// those copies are under way while the block merges.

#include "ops/attn_decode/kernels.h"
#include "ops/attn_decode/mma.cuh"

namespace fusedkv {

namespace {

constexpr int kRows = 8, kTokens = 16, kStages = 2;

template <typename T_, int kD_, int kKeys_, int kValues_>
struct MmaWarpKernel {
  using T = T_;
  static constexpr int kD = kD_, kKeys = kKeys_, kValues = kValues_;
  static constexpr int kSteps = kD / 16;  // of 16 channels
  static constexpr int kTileBytes = kTokens * kD * 2;
  static constexpr MmaWarpLayout kLayout = mma_warp_layout(kD, kKeys, kValues);
  static constexpr int kMaxThreads = 32 * mma_warp_count(kD, kKeys, kValues, kSharedBytesSm90);
  static constexpr int kRingBytes = kLayout.ring_bytes;
};

template <typename K>
struct State {
  float max[2], sum[2];  // of rows 2 (lane % 4) and + 1; each lane sums its own tokens
  float o[K::kValues][K::kSteps][4];
};

// Scores of 16 tokens against 8 rows, in two independent chains.
template <typename K>
__device__ __forceinline__ void scores(float (&s)[4], uint32_t keys,
                                       const uint32_t (&q)[K::kKeys][K::kSteps][2]) {
  float odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = 0.f;
#pragma unroll
  for (int j = 0; j < K::kKeys; ++j)
#pragma unroll
    for (int step = 0; step < K::kSteps; step += 2) {
      uint32_t a[4], b[4];
      load_key_fragment<K::kD>(a, keys + j * K::kTileBytes, 0, step);
      load_key_fragment<K::kD>(b, keys + j * K::kTileBytes, 0, step + 1);
      mma(s, a, q[j][step], typename K::T{});
      mma(odd, b, q[j][step + 1], typename K::T{});
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] += odd[i];
}

// Soft cap and ALiBi of all scores of a lane: two rows, and tokens `token` and `token` + 8.
__device__ __forceinline__ void adjust_scores(float (&s)[4], const AttnCudaParams& p, const WorkChunk& w,
                                              int token) {
  const int row = w.row_begin + int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = adjusted_score(p, w, row + i % 2, token + i / 2 * 8, s[i]);
}

// Scores become probabilities relative to the running maximum, as the B fragment of the second product.
template <typename K>
__device__ __forceinline__ void softmax(uint32_t (&probabilities)[2], float (&s)[4], State<K>& state,
                                        float scale, int token, const TokenRangeOf<int> (&visible)[2]) {
  bool grew = false;
  float rescale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool first = token >= visible[r].begin && token < visible[r].end;
    const bool second = token + 8 >= visible[r].begin && token + 8 < visible[r].end;
    s[r] = first ? s[r] * scale : minus_infinity();
    s[r + 2] = second ? s[r + 2] * scale : minus_infinity();
    float highest = fmaxf(s[r], s[r + 2]);
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, apart));
    const float old = state.max[r];
    state.max[r] = fmaxf(old, highest);
    const float base = state.max[r] == minus_infinity() ? 0.f : state.max[r];
    rescale[r] = ptx::ex2(old - base);
    grew |= state.max[r] > old;
    s[r] = ptx::ex2(s[r] - base);
    s[r + 2] = ptx::ex2(s[r + 2] - base);
    state.sum[r] = state.sum[r] * rescale[r] + s[r] + s[r + 2];
  }
  if (__any_sync(kFullWarp, grew)) {
#pragma unroll
    for (int j = 0; j < K::kValues; ++j)
#pragma unroll
      for (int step = 0; step < K::kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.o[j][step][i] *= rescale[i % 2];
  }
  probabilities[0] = ptx::movmatrix_trans(pack(s[0], s[1], typename K::T{}));
  probabilities[1] = ptx::movmatrix_trans(pack(s[2], s[3], typename K::T{}));
}

// q (.) a_j of 8 rows as B fragments, rounded once. Rows and channels beyond the last are zeros. Every load
// is unconditional, from an address that exists, and selects come after: so all loads of a round are in
// flight.
template <typename K>
__device__ __forceinline__ void fold_queries(uint32_t (&q)[K::kKeys][K::kSteps][2], const AttnCudaParams& p,
                                             const WorkChunk& w) {
  using T = typename K::T;
  constexpr int kPairs = K::kD / 8;  // of channels that a lane has
  const AttnDecodeParams& a = p.attn;
  const int lane = threadIdx.x % 32;
  const auto channel = [&](int i) { return i * 8 + lane % 4 * 2; };
  const auto existing = [&](int i) { return channel(i) < a.D ? channel(i) : 0; };
  const T* row = query_data<T>(p, w, w.row_begin + lane / 4);
  const T* from = row ? row : static_cast<const T*>(a.q);
  uint32_t pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) pairs[i] = load(reinterpret_cast<const uint32_t*>(from + existing(i)));
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    if (!row || channel(i) >= a.D) pairs[i] = 0;
  if (!a.key_weights) {
#pragma unroll
    for (int i = 0; i < K::kKeys * kPairs; ++i) q[i / kPairs][i % kPairs / 2][i % 2] = pairs[i % kPairs];
    return;
  }
#pragma unroll
  for (int j = 0; j < K::kKeys; ++j) {
    const float* weights = a.key_weights + (j * a.G + w.g) * a.D;  // may be a view: aligned to 4 bytes only
    float x[kPairs][2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      x[i][0] = load(weights + existing(i)), x[i][1] = load(weights + existing(i) + 1);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) q[j][i / 2][i % 2] = folded_pair<T>(pairs[i], x[i][0], x[i][1]);
  }
}

// A warp's steps: tokens first_token, first_token + token_stride, ...
__device__ __forceinline__ int first_token(const WorkChunk& w) {
  return (w.token_begin / kTokens + int(threadIdx.x) / 32) * kTokens;
}

__device__ __forceinline__ int token_stride() {
  return int(blockDim.x) / 32 * kTokens;
}

template <typename K>
__device__ __forceinline__ void copy_keys(const AttnCudaParams& p, const WorkChunk& w, uint32_t ring,
                                          int stage, int t, TokenPlace at, bool* bad) {
  copy_tile<typename K::T, K::kD, K::kKeys, kTokens, 32>(p, w, p.attn.keys, int(p.attn.D),
                                                         ring + stage * (K::kKeys * K::kTileBytes), t, at,
                                                         threadIdx.x % 32, bad);
}

template <typename K>
__device__ __forceinline__ void copy_values(const AttnCudaParams& p, const WorkChunk& w, uint32_t ring,
                                            int stage, int t, TokenPlace at, bool* bad) {
  constexpr int kFirst = kStages * K::kKeys * K::kTileBytes;
  copy_tile<typename K::T, K::kD, K::kValues, kTokens, 32>(
      p, w, p.attn.values, int(p.attn.Dv), ring + kFirst + stage * (K::kValues * K::kTileBytes), t, at,
      threadIdx.x % 32, bad);
}

// What a warp knows of a chunk whose first copies are under way.
struct Lookahead {
  TokenPlace next, after;  // of the tokens one and two steps on
  bool bad;                // a page is out of range
};

// Starts the copies of a warp's first step and of the keys of its second. One group of copies per step: the
// values of the step before and the keys of this one.
template <typename K>
__device__ __forceinline__ Lookahead start_copies(const AttnCudaParams& p, const WorkChunk& w,
                                                  uint32_t ring) {
  const int first = first_token(w), stride = token_stride();
  const TokenPlace now = find_tile<kTokens>(p, w, first);
  Lookahead l = {find_tile<kTokens>(p, w, first + stride), find_tile<kTokens>(p, w, first + 2 * stride),
                 false};
  if (first >= w.token_end) return l;
  copy_keys<K>(p, w, ring, 0, first, now, &l.bad);
  ptx::cp_async_commit();
  copy_values<K>(p, w, ring, 0, first, now, &l.bad);
  copy_keys<K>(p, w, ring, 1, first + stride, l.next, &l.bad);
  ptx::cp_async_commit();
  return l;
}

// All steps of a warp, after start_copies.
template <typename K>
__device__ __forceinline__ void run_steps(const AttnCudaParams& p, const WorkChunk& w, uint32_t ring,
                                          Lookahead l, State<K>& state) {
  const int lane = threadIdx.x % 32, first = first_token(w), stride = token_stride();
  const uint32_t value_ring = ring + kStages * K::kKeys * K::kTileBytes;
  TokenRangeOf<int> visible[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    visible[r] = visible_tokens(p, w, w.row_begin + lane % 4 * 2 + r);
    visible[r].end = visible[r].end < w.token_end ? visible[r].end : w.token_end;
  }
  if (first < w.token_end) {
    uint32_t q[K::kKeys][K::kSteps][2];
    fold_queries<K>(q, p, w);
    ptx::cp_async_wait<1>();
    __syncwarp();
    int stage = 0;
    for (int t = first; t < w.token_end; t += stride, stage ^= 1) {
      float s[4];
      scores<K>(s, ring + stage * (K::kKeys * K::kTileBytes), q);
      __syncwarp();  // all lanes have read these keys, and the values of the step before
      copy_values<K>(p, w, ring, stage ^ 1, t + stride, l.next, &l.bad);
      copy_keys<K>(p, w, ring, stage, t + 2 * stride, l.after, &l.bad);
      ptx::cp_async_commit();
      l.next = l.after;
      l.after = find_tile<kTokens>(p, w, t + 3 * stride);
      uint32_t probabilities[2];
      const bool adjusts = adjusts_scores(p.attn);
      if (adjusts) adjust_scores(s, p, w, t + lane / 4);
      softmax(probabilities, s, state, adjusts ? kLog2e : p.attn.scale * kLog2e, t + lane / 4, visible);
      ptx::cp_async_wait<1>();
      __syncwarp();
#pragma unroll
      for (int j = 0; j < K::kValues; ++j)
#pragma unroll
        for (int step = 0; step < K::kSteps; ++step) {
          uint32_t v[4];
          load_value_fragment<K::kD>(v, value_ring + stage * (K::kValues * K::kTileBytes) + j * K::kTileBytes,
                                     0, step);
          mma(state.o[j][step], v, probabilities, typename K::T{});
        }
    }
    ptx::cp_async_wait<0>();
    __syncwarp();  // all lanes have read the last values: the ring is free
  }
  if (__any_sync(kFullWarp, l.bad) || w.len < 0) state.sum[0] = state.sum[1] = not_a_number();
}

// Stores a warp's state, with the sources of the output added up, for merge_states.
template <typename K>
__device__ __forceinline__ void store_state(const AttnCudaParams& p, const WorkChunk& w,
                                            const BlockStates& to, State<K>& state) {
  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * kRows + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2)
      state.sum[r] += __shfl_xor_sync(kFullWarp, state.sum[r], apart);
    if (lane < 4) ptx::st_shared_f32(to.maxima + (row + r) * 4, state.max[r]);
    if (lane < 4) ptx::st_shared_f32(to.sums + (row + r) * 4, state.sum[r]);
  }
  // All loads of a source's weights are in flight together.
  float out[K::kSteps * 2][2] = {};
#pragma unroll
  for (int j = 0; j < K::kValues; ++j) {
    const float* weights = value_weights(p.attn, j, w.g);
    float b[K::kSteps * 2];
#pragma unroll
    for (int i = 0; i < K::kSteps * 2; ++i) b[i] = 1.f;
    if (weights) {
#pragma unroll
      for (int i = 0; i < K::kSteps * 2; ++i)
        if (i * 8 + lane / 4 < p.attn.Dv) b[i] = load(weights + lane / 4 + i * 8);
    }
#pragma unroll
    for (int i = 0; i < K::kSteps * 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) out[i][r] += b[i] * state.o[j][i / 2][i % 2 * 2 + r];
  }
  const uint32_t first = to.outs + (row * to.pitch + lane / 4) * 4;
#pragma unroll
  for (int i = 0; i < K::kSteps * 2; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) ptx::st_shared_f32(first + (r * to.pitch + i * 8) * 4, out[i][r]);
}

template <typename K>
__global__ void __launch_bounds__(K::kMaxThreads, 1)
    attn_decode_mma_warp_kernel(const __grid_constant__ AttnCudaParams p) {
  const int threads = int(blockDim.x), warps = threads / 32;
  const uint32_t ring = shared_base() + threadIdx.x / 32 * K::kRingBytes;
  const BlockStates states =
      block_states(shared_base() + warps * K::kRingBytes, warps, kRows, K::kLayout.pitch);
  const BlockWork work = begin_block(p, threads);
  WorkChunk w = {};  // none yet
  w.next = work.begin;
  State<K> state;
  while (true) {
    const WorkChunk next = next_chunk(p, work, w.next);
    const Lookahead lookahead = start_copies<K>(p, next, ring);
    if (w.splits > 0) {
      __syncthreads();  // the chunk before is merged
      store_state(p, w, states, state);
      __syncthreads();
      merge_states<typename K::T>(p, w, states, threads);
      finish_chunk<typename K::T>(p, w, states.flag, states.outs, threads);
    }
    if (next.splits == 0) break;
    w = next;
#pragma unroll
    for (int r = 0; r < 2; ++r) state.max[r] = minus_infinity(), state.sum[r] = 0.f;
#pragma unroll
    for (int j = 0; j < K::kValues; ++j)
#pragma unroll
      for (int step = 0; step < K::kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.o[j][step][i] = 0.f;
    run_steps(p, w, ring, lookahead, state);
  }
}

}  // namespace

template <typename T, int kD>
AttnKernelFunction attn_mma_warp_kernel(int keys, int values) {
  if constexpr (kD <= 128) {
    if (keys == 2 && values == 2) return attn_decode_mma_warp_kernel<MmaWarpKernel<T, kD, 2, 2>>;
    if (keys == 2) return attn_decode_mma_warp_kernel<MmaWarpKernel<T, kD, 2, 1>>;
    if (values == 2) return attn_decode_mma_warp_kernel<MmaWarpKernel<T, kD, 1, 2>>;
  }
  return attn_decode_mma_warp_kernel<MmaWarpKernel<T, kD, 1, 1>>;
}

template AttnKernelFunction attn_mma_warp_kernel<FUSEDKV_UNIT>(int keys, int values);

}  // namespace fusedkv
