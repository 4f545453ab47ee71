// out[r] = softmax_t(scale * q_r . K[t]) V[t]    with K = sum_i a_i (.) K_i and V = sum_j b_j (.) V_j.
//
// For calls that the tensor-core kernels do not support: float32, more than two sources, memory that is not
// aligned to 16 bytes, and two sources of more than 128 channels where a block has too little shared memory.
// A team of 8, 16 or 32 lanes with 8 channels each fuses each token's key and value in registers, once for
// four query rows. Every team has its own tokens, softmax state and output; the results of the teams are
// merged at the end of the chunk. All sums are float32.

#include "ops/attn_decode/team.cuh"

namespace fusedkv {

namespace {

constexpr int kRows = kTeamRows, kVec = kTeamVec;

template <typename T, int kD>
struct FallbackKernel : TeamKernel<T, kD> {};

// x = sum_j w_j (.) source_j of one token: channels d .. d + 7.
template <typename T>
__device__ __forceinline__ void fuse_token(float (&x)[kVec], const CacheTensor* sources, int m,
                                           const float* weights, int64_t G, int64_t D, int g,
                                           TokenPlace place, int d, bool aligned) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = 0.f;
#pragma unroll 1
  for (int j = 0; j < m; ++j) {
    float source[kVec];
    load_channels(source, token_data<T>(sources[j], g, place) + d, aligned);
    const float* w = weights ? weights + (j * G + g) * D + d : nullptr;
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = w ? x[i] + load(w + i) * source[i] : x[i] + source[i];
  }
}

template <typename K>
__device__ __forceinline__ void run_tokens(const AttnCudaParams& p, const WorkChunk& w, TeamState& state,
                                           int team, int d) {
  const AttnDecodeParams& a = p.attn;
  float q[kRows][kVec];
  TokenRangeOf<int> visible[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = w.row_begin + r;
    const QueryRow at = query_row(p, w.g, row);
#pragma unroll
    for (int i = 0; i < kVec; ++i) q[r][i] = 0.f;
    if (row < w.num_rows && d < a.D)
      load_channels(
          q[r],
          static_cast<const typename K::T*>(a.q) + query_offset(a, w.b, w.queries.first, at.s, at.h) + d,
          p.aligned);
    visible[r] = visible_tokens(p, w, row);
  }
  bool bad = false;
#pragma unroll 1
  for (int t = w.token_begin + team; t - team < w.token_end; t += K::kTeams) {
    const TokenPlace place = find_token(p, w, t);
    const bool there = exists(p, place, &bad);
    float x[kVec] = {}, v[kVec] = {};
    if (there && d < a.D)
      fuse_token<typename K::T>(x, a.keys, a.num_keys, a.key_weights, a.G, a.D, w.g, place, d, p.aligned);
    if (there && d < a.Dv)
      fuse_token<typename K::T>(v, a.values, a.num_values, a.value_weights, a.G, a.Dv, w.g, place, d,
                                p.aligned);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) score += q[r][i] * x[i];
#pragma unroll
      for (int apart = 1; apart < K::kLanes; apart *= 2) score += __shfl_xor_sync(kFullWarp, score, apart);
      const bool sees = there && t >= visible[r].begin && t < visible[r].end;
      const bool adjusts = adjusts_scores(a);
      if (adjusts) score = adjusted_score(p, w, w.row_begin + r, t, score);
      score = sees ? score * (adjusts ? kLog2e : a.scale * kLog2e) : minus_infinity();
      const float old = state.max[r];
      state.max[r] = fmaxf(old, score);
      const float base = state.max[r] == minus_infinity() ? 0.f : state.max[r];
      const float rescale = exp2f(old - base), e = exp2f(score - base);
      state.sum[r] = state.sum[r] * rescale + e;
#pragma unroll
      for (int i = 0; i < kVec; ++i) state.o[r][i] = state.o[r][i] * rescale + e * v[i];
    }
  }
  spoil_if(bad || w.len < 0, state);
}

template <typename K>
__global__ void __launch_bounds__(K::kThreads)
    attn_decode_fallback_kernel(const __grid_constant__ AttnCudaParams p) {
  run_chunks<K>(
      p, [&](const WorkChunk& w, TeamState& state, int team, int d) { run_tokens<K>(p, w, state, team, d); });
}

}  // namespace

AttnKernelFunction attn_fallback_kernel(DType dtype, int head_dim) {
  const auto with = [&](auto type) -> AttnKernelFunction {
    using T = typename decltype(type)::type;
    if (head_dim == 64) return attn_decode_fallback_kernel<FallbackKernel<T, 64>>;
    if (head_dim == 128) return attn_decode_fallback_kernel<FallbackKernel<T, 128>>;
    return attn_decode_fallback_kernel<FallbackKernel<T, 256>>;
  };
  return dtype == DType::f32    ? with(TypeTag<float>{})
         : dtype == DType::bf16 ? with(TypeTag<bf16>{})
                                : with(TypeTag<f16>{});
}

}  // namespace fusedkv
