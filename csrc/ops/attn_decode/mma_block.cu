// out[r] = sum_j b_j (.) (softmax_t(scale * sum_i (q_r (.) a_i) . K_i[t]) V_j[t])    for 9 to 64 query rows.
//
// Also for fewer rows of two sources of more than 128 channels, which one warp cannot hold.
//
// The products are those of mma_warp.cu: tokens on M and query rows on N. With more than 8 rows the output of
// all channels does not fit the registers of one warp. So four warps (eight for 64 rows) share a tile of 32
// tokens:
//
//   scores   warp w takes 16 tokens (half w % 2) and a part of the rows (w / 2); queries in shared memory
//   softmax  the two warps of the same rows exchange their maxima; probabilities go to shared memory
//   values   warp w takes a part of the channels of every source, all rows and all 32 tokens
//
// with two barriers per tile. The cp.async ring has two stages. Group k of the copies has the values of tile
// k - 1 and the keys of tile k:
//
//   scores i | maxima, barrier | copy V_i+1, K_i+2 | probabilities, wait V_i, K_i+1, barrier | values i
//
// After the first barrier all warps are done with keys i and values i - 1; the copies overwrite them.

#include <type_traits>

#include "ops/attn_decode/kernels.h"
#include "ops/attn_decode/mma.cuh"

namespace fusedkv {

namespace {

constexpr int kTokens = kKVTileTokens;

template <typename T_, int kD_, int kKeys_, int kValues_, int kRows_>
struct MmaBlockKernel {
  using T = T_;
  static constexpr int kD = kD_, kKeys = kKeys_, kValues = kValues_, kRows = kRows_;
  static constexpr MmaBlockLayout kLayout = mma_block_layout(kD, kKeys, kValues, kRows);
  static constexpr int kThreads = kLayout.threads, kTileBytes = kLayout.tile_bytes;
  static constexpr int kWarpRows = kLayout.warp_rows, kRowTiles = kWarpRows / 8;  // of 8 rows
  static constexpr int kChannelTiles = kLayout.channel_tiles;
};

// The softmax state of the rows that a warp scores: 2 per row tile and lane.
template <typename K>
struct RowState {
  float max[K::kRowTiles][2], sum[K::kRowTiles][2];
};

// q (.) a_j of all rows, rounded once, into shared memory. Rows and channels beyond the last are zeros. All
// loads are unconditional, from addresses that exist, so that they are in flight together.
template <typename K>
__device__ __forceinline__ void fold_queries(const AttnCudaParams& p, const WorkChunk& w, uint32_t queries) {
  using T = typename K::T;
  const AttnDecodeParams& a = p.attn;
#pragma unroll 1
  for (int i = threadIdx.x; i < K::kKeys * K::kRows * K::kD / 8; i += K::kThreads) {
    const int vector = i % (K::kD / 8), row = i / (K::kD / 8) % K::kRows, j = i / (K::kD / 8) / K::kRows;
    const T* from = query_data<T>(p, w, w.row_begin + row);
    const bool there = from && vector * 8 < a.D;
    const int d = there ? vector * 8 : 0;
    uint4 x = load(reinterpret_cast<const uint4*>(there ? from + d : static_cast<const T*>(a.q)));
    if (a.key_weights) {
      const float* weights = a.key_weights + (j * a.G + w.g) * a.D + d;  // aligned to 4 bytes only
      float y[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) y[c] = load(weights + c);
      x = {folded_pair<T>(x.x, y[0], y[1]), folded_pair<T>(x.y, y[2], y[3]), folded_pair<T>(x.z, y[4], y[5]),
           folded_pair<T>(x.w, y[6], y[7])};
    }
    if (!there) x = {0, 0, 0, 0};
    ptx::st_shared_b128(tile_address<K::kD>(queries + j * (K::kRows * K::kD * 2), row, vector), x);
  }
}

// Scores of 16 tokens against this warp's rows.
template <typename K>
__device__ __forceinline__ void scores(float (&s)[K::kRowTiles][4], uint32_t keys, uint32_t queries,
                                       int token, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < K::kRowTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
#pragma unroll
  for (int j = 0; j < K::kKeys; ++j)
#pragma unroll
    for (int step = 0; step < K::kD / 16; step += 2) {
      uint32_t a[4], b[4];
      load_key_fragment<K::kD>(a, keys + j * (K::kTileBytes), token, step);
      load_key_fragment<K::kD>(b, keys + j * (K::kTileBytes), token, step + 1);
#pragma unroll
      for (int n = 0; n < K::kRowTiles; ++n) {
        uint32_t q[4];  // B fragments of 8 rows and 32 channels
        ptx::ldmatrix_x4(q, tile_address<K::kD>(queries + j * (K::kRows * K::kD * 2), row + n * 8 + lane % 8,
                                                2 * step + lane / 8));
        mma(s[n], a, {q[0], q[1]}, typename K::T{});
        mma(s[n], b, {q[2], q[3]}, typename K::T{});
      }
    }
}

// Soft cap and ALiBi of all scores of a lane: two rows per tile, and tokens `token` and `token` + 8.
template <typename K>
__device__ __forceinline__ void adjust_scores(float (&s)[K::kRowTiles][4], const AttnCudaParams& p,
                                              const WorkChunk& w, int token, int row_begin) {
  const int row = w.row_begin + row_begin + int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < K::kRowTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[n][i] = adjusted_score(p, w, row + n * 8 + i % 2, token + i / 2 * 8, s[n][i]);
}

// Scales and masks scores; leaves each row's maximum over this warp's tokens in shared memory.
template <typename K>
__device__ __forceinline__ void mask_and_max(float (&s)[K::kRowTiles][4],
                                             const TokenRangeOf<int> (&visible)[K::kRowTiles][2], float scale,
                                             int token, uint32_t maxima) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < K::kRowTiles; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool first = token >= visible[n][r].begin && token < visible[n][r].end;
      const bool second = token + 8 >= visible[n][r].begin && token + 8 < visible[n][r].end;
      s[n][r] = first ? s[n][r] * scale : minus_infinity();
      s[n][r + 2] = second ? s[n][r + 2] * scale : minus_infinity();
      float highest = fmaxf(s[n][r], s[n][r + 2]);
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2)
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, apart));
      if (lane < 4) ptx::st_shared_f32(maxima + (n * 8 + lane * 2 + r) * 4, highest);
    }
}

// Probabilities and the factor that rescales each row's output, to shared memory.
template <typename K>
__device__ __forceinline__ void probabilities(const float (&s)[K::kRowTiles][4], RowState<K>& state,
                                              uint32_t base, int token_half, int row_begin) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < K::kRowTiles; ++n) {
    const int row = row_begin + n * 8 + lane % 4 * 2;
    float e[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old = state.max[n][r];
      const float highest = fmaxf(ptx::ld_shared_f32(base + K::kLayout.maxima + (row + r) * 4),
                                  ptx::ld_shared_f32(base + K::kLayout.maxima + (K::kRows + row + r) * 4));
      state.max[n][r] = fmaxf(old, highest);
      const float reference = state.max[n][r] == minus_infinity() ? 0.f : state.max[n][r];
      const float rescale = ptx::ex2(old - reference);
      e[r] = ptx::ex2(s[n][r] - reference);
      e[r + 2] = ptx::ex2(s[n][r + 2] - reference);
      state.sum[n][r] = state.sum[n][r] * rescale + e[r] + e[r + 2];
      if (token_half == 0 && lane < 4) ptx::st_shared_f32(base + K::kLayout.rescale + (row + r) * 4, rescale);
    }
    const uint32_t to = base + K::kLayout.probabilities +
                        (token_half * 16 + lane / 4) * K::kLayout.probability_pitch + row * 2;
    ptx::st_shared_b32(to, pack(e[0], e[1], typename K::T{}));
    ptx::st_shared_b32(to + 8 * K::kLayout.probability_pitch, pack(e[2], e[3], typename K::T{}));
  }
}

// O^T of this warp's channels: (sources, tiles of 16 channels, tiles of 8 rows) C fragments.
template <typename K>
struct Output {
  float o[K::kValues][K::kChannelTiles][K::kRows / 8][4];
};

template <typename K>
__device__ __forceinline__ void rescale_output(Output<K>& out, uint32_t base) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < K::kRows / 8; ++n) {
    const float first = ptx::ld_shared_f32(base + K::kLayout.rescale + (n * 8 + lane % 4 * 2) * 4);
    const float second = ptx::ld_shared_f32(base + K::kLayout.rescale + (n * 8 + lane % 4 * 2 + 1) * 4);
    if (!__any_sync(kFullWarp, first != 1.f || second != 1.f)) continue;
#pragma unroll
    for (int j = 0; j < K::kValues; ++j)
#pragma unroll
      for (int m = 0; m < K::kChannelTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) out.o[j][m][n][i] *= i % 2 ? second : first;
  }
}

template <typename K>
__device__ __forceinline__ void add_values(Output<K>& out, uint32_t base, int stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t values = base + K::kLayout.value_ring + stage * (K::kValues * K::kTileBytes);
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    uint32_t e[K::kRows / 8][2];  // B fragments of 16 tokens
#pragma unroll
    for (int n = 0; n < K::kRows / 8; n += 2) {
      uint32_t two[4];
      ptx::ldmatrix_x4_trans(two, base + K::kLayout.probabilities +
                                      (k * 16 + lane % 16) * K::kLayout.probability_pitch +
                                      (n * 8 + lane / 16 * 8) * 2);
      e[n][0] = two[0], e[n][1] = two[1], e[n + 1][0] = two[2], e[n + 1][1] = two[3];
    }
#pragma unroll
    for (int j = 0; j < K::kValues; ++j)
#pragma unroll
      for (int m = 0; m < K::kChannelTiles; ++m) {
        uint32_t v[4];
        load_value_fragment<K::kD>(v, values + j * K::kTileBytes, k * 16, warp * K::kChannelTiles + m);
#pragma unroll
        for (int n = 0; n < K::kRows / 8; ++n) mma(out.o[j][m][n], v, e[n], typename K::T{});
      }
  }
}

// All tiles of a chunk. `base` is where the block's shared memory begins.
template <typename K>
__device__ __forceinline__ void run_tiles(const AttnCudaParams& p, const WorkChunk& w, uint32_t base,
                                          RowState<K>& state, Output<K>& out) {
  const AttnDecodeParams& a = p.attn;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token_half = warp % 2, row_begin = warp / 2 * K::kWarpRows;
  TokenRangeOf<int> visible[K::kRowTiles][2];
#pragma unroll
  for (int n = 0; n < K::kRowTiles; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      visible[n][r] = visible_tokens(p, w, w.row_begin + row_begin + n * 8 + lane % 4 * 2 + r);
      visible[n][r].end = visible[n][r].end < w.token_end ? visible[n][r].end : w.token_end;
    }

  bool bad = false;
  const auto copy_keys = [&](int stage, int t, TokenPlace at) {
    copy_tile<typename K::T, K::kD, K::kKeys, kTokens, K::kThreads>(
        p, w, a.keys, int(a.D), base + stage * (K::kKeys * K::kTileBytes), t, at, threadIdx.x, &bad);
  };
  const auto copy_values = [&](int stage, int t, TokenPlace at) {
    copy_tile<typename K::T, K::kD, K::kValues, kTokens, K::kThreads>(
        p, w, a.values, int(a.Dv), base + K::kLayout.value_ring + stage * (K::kValues * K::kTileBytes), t, at,
        threadIdx.x, &bad);
  };

  const int first = w.token_begin / kTokens * kTokens;
  if (first < w.token_end) {
    const TokenPlace now = find_tile<kTokens>(p, w, first);
    TokenPlace next = find_tile<kTokens>(p, w, first + kTokens);
    TokenPlace after = find_tile<kTokens>(p, w, first + 2 * kTokens);
    copy_keys(0, first, now);
    ptx::cp_async_commit();
    copy_values(0, first, now);
    copy_keys(1, first + kTokens, next);
    ptx::cp_async_commit();
    fold_queries<K>(p, w, base + K::kLayout.queries);
    ptx::cp_async_wait<1>();
    __syncthreads();
    int stage = 0;
    for (int t = first; t < w.token_end; t += kTokens, stage ^= 1) {
      float s[K::kRowTiles][4];
      const int token = token_half * 16;
      scores<K>(s, base + stage * (K::kKeys * K::kTileBytes), base + K::kLayout.queries, token, row_begin);
      const bool adjusts = adjusts_scores(a);
      if (adjusts) adjust_scores<K>(s, p, w, t + token + lane / 4, row_begin);
      mask_and_max<K>(s, visible, adjusts ? kLog2e : a.scale * kLog2e, t + token + lane / 4,
                      base + K::kLayout.maxima + (token_half * K::kRows + row_begin) * 4);
      __syncthreads();
      copy_values(stage ^ 1, t + kTokens, next);
      copy_keys(stage, t + 2 * kTokens, after);
      ptx::cp_async_commit();
      next = after;
      after = find_tile<kTokens>(p, w, t + 3 * kTokens);
      probabilities<K>(s, state, base, token_half, row_begin);
      ptx::cp_async_wait<1>();
      __syncthreads();
      rescale_output(out, base);
      add_values(out, base, stage);
    }
    ptx::cp_async_wait<0>();
  }
  if (__any_sync(kFullWarp, bad) || w.len < 0) {
#pragma unroll
    for (int n = 0; n < K::kRowTiles; ++n) state.sum[n][0] = state.sum[n][1] = not_a_number();
  }
}

// Each row's sum and maximum over all tokens to shared memory, at kLayout.sums and kLayout.maxima.
template <typename K>
__device__ __forceinline__ void store_state(RowState<K>& state, uint32_t base) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < K::kRowTiles; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = state.sum[n][r];
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
      const int row = warp % 2 * K::kRows + warp / 2 * K::kWarpRows + n * 8 + lane * 2 + r;
      if (lane < 4) ptx::st_shared_f32(base + K::kLayout.sums + row * 4, sum);
      if (lane < 4) ptx::st_shared_f32(base + K::kLayout.maxima + row * 4, state.max[n][r]);
    }
  __syncthreads();
}

// The output of all rows to shared memory, where the rings were: rows of kD + 4 floats, with the sources
// added up. So partial results are as wide as one source.
template <typename K>
__device__ __forceinline__ void stage_output(const AttnCudaParams& p, const WorkChunk& w,
                                             const Output<K>& out, uint32_t base) {
  static_assert(K::kRows * (K::kD + 4) * 4 <= K::kLayout.probabilities);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < K::kChannelTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = (warp * K::kChannelTiles + m) * 16 + half * 8 + lane / 4;
      float weights[K::kValues];
#pragma unroll
      for (int j = 0; j < K::kValues; ++j) {
        const float* b = value_weights(p.attn, j, w.g);
        weights[j] = b && d < p.attn.Dv ? load(b + d) : 1.f;
      }
#pragma unroll
      for (int n = 0; n < K::kRows / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float x = 0.f;
#pragma unroll
          for (int j = 0; j < K::kValues; ++j) x += weights[j] * out.o[j][m][n][half * 2 + r];
          ptx::st_shared_f32(base + ((n * 8 + lane % 4 * 2 + r) * (K::kD + 4) + d) * 4, x);
        }
    }
}

// Writes the results of all rows: one warp per row, four channels per lane.
template <typename K>
__device__ __forceinline__ void write_rows(const AttnCudaParams& p, const WorkChunk& w, uint32_t base) {
  const int rows = rows_of_chunk(p, w), Dv = int(p.attn.Dv);
  for (int row = threadIdx.x / 32; row < rows; row += K::kThreads / 32) {
    const float sum = ptx::ld_shared_f32(base + K::kLayout.sums + row * 4) +
                      ptx::ld_shared_f32(base + K::kLayout.sums + (K::kRows + row) * 4);
    const float highest = ptx::ld_shared_f32(base + K::kLayout.maxima + row * 4);
    for (int d = threadIdx.x % 32 * 4; d < Dv; d += 128) {
      const Vector<float, 4> x = floats_of(ptx::ld_shared_b128(base + (row * (K::kD + 4) + d) * 4));
      write_result<typename K::T>(p, w, row, d, x, sum, highest);
    }
  }
}

template <typename K>
__global__ void __launch_bounds__(K::kThreads, 1)
    attn_decode_mma_block_kernel(const __grid_constant__ AttnCudaParams p) {
  const uint32_t base = shared_base();
  const BlockWork work = begin_block(p, K::kThreads);
  WorkChunk w = {};
  w.next = work.begin;
  while ((w = next_chunk(p, work, w.next)).splits > 0) {
    RowState<K> state;
#pragma unroll
    for (int n = 0; n < K::kRowTiles; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) state.max[n][r] = minus_infinity(), state.sum[n][r] = 0.f;
    Output<K> out = {};
    run_tiles(p, w, base, state, out);
    store_state<K>(state, base);

    stage_output<K>(p, w, out, base);
    __syncthreads();
    write_rows<K>(p, w, base);
    finish_chunk<typename K::T>(p, w, base + K::kLayout.flag, base, K::kThreads);
    __syncthreads();  // the next chunk reuses shared memory
  }
}

}  // namespace

template <typename T, int kD, int kKeys>
AttnKernelFunction attn_mma_block_kernel(int values, int rows) {
  const auto of_values = [&](auto v) -> AttnKernelFunction {
    constexpr int kValues = decltype(v)::value;
    if (rows == 16) return attn_decode_mma_block_kernel<MmaBlockKernel<T, kD, kKeys, kValues, 16>>;
    constexpr int kMost = max_block_rows(kD, kKeys, kValues);
    if (rows == kMost) return attn_decode_mma_block_kernel<MmaBlockKernel<T, kD, kKeys, kValues, kMost>>;
    return attn_decode_mma_block_kernel<MmaBlockKernel<T, kD, kKeys, kValues, 32>>;
  };
  return values == 2 ? of_values(std::integral_constant<int, 2>{})
                     : of_values(std::integral_constant<int, 1>{});
}

template AttnKernelFunction attn_mma_block_kernel<FUSEDKV_UNIT>(int values, int rows);

}  // namespace fusedkv
