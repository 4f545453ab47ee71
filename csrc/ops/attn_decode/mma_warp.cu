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
// A block needs at most 64 KiB of shared memory. Three fit on an SM of 227 KiB, two on one of 163 KiB, and
// one on every other since sm_80.

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
  static constexpr int kWarps = kLayout.warps, kThreads = kLayout.threads, kRingBytes = kLayout.ring_bytes;
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

// All steps of this warp: tokens first, first + 16 kWarps, ...
template <typename K>
__device__ __forceinline__ void run_steps(const AttnCudaParams& p, const WorkChunk& w, uint32_t ring,
                                          State<K>& state) {
  const AttnDecodeParams& a = p.attn;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  TokenRangeOf<int> visible[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    visible[r] = visible_tokens(p, w, w.row_begin + lane % 4 * 2 + r);
    visible[r].end = visible[r].end < w.token_end ? visible[r].end : w.token_end;
  }

  bool bad = false;
  const int first = w.token_begin / kTokens * kTokens + warp * kTokens, stride = K::kWarps * kTokens;
  const uint32_t value_ring = ring + kStages * K::kKeys * K::kTileBytes;
  const auto copy_keys = [&](int stage, int t, TokenPlace at) {
    copy_tile<typename K::T, K::kD, K::kKeys, kTokens, 32>(
        p, w, a.keys, int(a.D), ring + stage * (K::kKeys * K::kTileBytes), t, at, lane);
  };
  const auto copy_values = [&](int stage, int t, TokenPlace at) {
    copy_tile<typename K::T, K::kD, K::kValues, kTokens, 32>(
        p, w, a.values, int(a.Dv), value_ring + stage * (K::kValues * K::kTileBytes), t, at, lane);
  };

  if (first < w.token_end) {
    // One group of copies per step: the values of the step before and the keys of this one.
    const TokenPlace now = find_tile<kTokens>(p, w, first, &bad);
    TokenPlace next = find_tile<kTokens>(p, w, first + stride, &bad);
    TokenPlace after = find_tile<kTokens>(p, w, first + 2 * stride, &bad);
    copy_keys(0, first, now);
    ptx::cp_async_commit();
    copy_values(0, first, now);
    copy_keys(1, first + stride, next);
    ptx::cp_async_commit();
    uint32_t q[K::kKeys][K::kSteps][2];
    fold_queries<K>(q, p, w);
    ptx::cp_async_wait<1>();
    __syncwarp();
    int stage = 0;
    for (int t = first; t < w.token_end; t += stride, stage ^= 1) {
      float s[4];
      scores<K>(s, ring + stage * (K::kKeys * K::kTileBytes), q);
      __syncwarp();  // all lanes have read these keys, and the values of the step before
      copy_values(stage ^ 1, t + stride, next);
      copy_keys(stage, t + 2 * stride, after);
      ptx::cp_async_commit();
      next = after;
      after = find_tile<kTokens>(p, w, t + 3 * stride, &bad);
      uint32_t probabilities[2];
      softmax(probabilities, s, state, a.scale * kLog2e, t + lane / 4, visible);
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
  }
  if (__any_sync(kFullWarp, bad) || w.len < 0) state.sum[0] = state.sum[1] = not_a_number();
}

template <typename K>
__global__ void __launch_bounds__(K::kThreads, 1)
    attn_decode_mma_warp_kernel(const __grid_constant__ AttnCudaParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const BlockStates states = block_states(shared_base(), K::kWarps, kRows, K::kLayout.pitch);

  const BlockWork work = block_work(p);
  for (int64_t at = work.begin; at < work.end;) {
    const WorkChunk w = find_chunk(p, at, work);
    at = w.next;
    if (w.splits == 0) continue;
    State<K> state;
#pragma unroll
    for (int r = 0; r < 2; ++r) state.max[r] = minus_infinity(), state.sum[r] = 0.f;
#pragma unroll
    for (int j = 0; j < K::kValues; ++j)
#pragma unroll
      for (int step = 0; step < K::kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.o[j][step][i] = 0.f;
    run_steps(p, w, shared_base() + warp * K::kRingBytes, state);

    __syncthreads();  // the rings are free
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2)
        state.sum[r] += __shfl_xor_sync(kFullWarp, state.sum[r], apart);
      const int at_row = (warp * kRows + lane % 4 * 2 + r) * 4;
      if (lane < 4) ptx::st_shared_f32(states.maxima + at_row, state.max[r]);
      if (lane < 4) ptx::st_shared_f32(states.sums + at_row, state.sum[r]);
    }
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = step * 16 + half * 8 + lane / 4;
        float out[2] = {0.f, 0.f};
#pragma unroll
        for (int j = 0; j < K::kValues; ++j) {
          const float b = value_weight(p.attn, j, w.g, d);
          out[0] += b * state.o[j][step][half * 2];
          out[1] += b * state.o[j][step][half * 2 + 1];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
          ptx::st_shared_f32(states.outs + ((warp * kRows + lane % 4 * 2 + r) * K::kLayout.pitch + d) * 4,
                             out[r]);
      }
    __syncthreads();
    merge_states<typename K::T>(p, w, states, K::kThreads);
    finish_chunk<typename K::T>(p, w, states.flag, K::kThreads);
    __syncthreads();  // the next chunk reuses shared memory
  }
}

}  // namespace

AttnKernelFunction attn_mma_warp_kernel(DType dtype, int head_dim, int keys, int values) {
  return mma_kernel(
      dtype, head_dim, keys, values, [](auto type, auto d, auto k, auto v) -> AttnKernelFunction {
        return attn_decode_mma_warp_kernel<MmaWarpKernel<typename decltype(type)::type, decltype(d)::value,
                                                         decltype(k)::value, decltype(v)::value>>;
      });
}

}  // namespace fusedkv
