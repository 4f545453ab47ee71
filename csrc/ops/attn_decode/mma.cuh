// What mma_warp.cu and mma_block.cu share: 16-bit elements and swizzled tiles of tokens in shared memory.
#pragma once

#include "ops/attn_decode/work.cuh"

namespace fusedkv {

__device__ __forceinline__ uint32_t pack(float low, float high, bf16) {
  return ptx::cvt_bf16x2(low, high);
}

__device__ __forceinline__ uint32_t pack(float low, float high, f16) {
  return ptx::cvt_f16x2(low, high);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  ptx::mma_m16n8k16_bf16(c, a, b);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  ptx::mma_m16n8k16_f16(c, a, b);
}

// A tile is rows of kD 16-bit elements. The 16-byte vector c of row r is stored at vector c ^ (r % 8): the 8
// rows of an ldmatrix then fall into 8 different groups of banks.
template <int kD>
__device__ __forceinline__ uint32_t tile_address(uint32_t tile, int row, int vector) {
  return tile + row * (kD * 2) + ((vector ^ (row & 7)) << 4);
}

// A fragment of A = K: rows are tokens token .. token + 15, columns channels 16 step .. 16 step + 15.
template <int kD>
__device__ __forceinline__ void load_key_fragment(uint32_t (&a)[4], uint32_t tile, int token, int step) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  ptx::ldmatrix_x4(a, tile_address<kD>(tile, token + lane % 8 + (matrix & 1) * 8, 2 * step + (matrix >> 1)));
}

// A fragment of A = V^T: rows are channels 16 step .. 16 step + 15, columns tokens token .. token + 15.
template <int kD>
__device__ __forceinline__ void load_value_fragment(uint32_t (&a)[4], uint32_t tile, int token, int step) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  ptx::ldmatrix_x4_trans(
      a, tile_address<kD>(tile, token + lane % 8 + (matrix >> 1) * 8, 2 * step + (matrix & 1)));
}

// The places of a tile's tokens. With p.whole_pages, runs of 16 tokens are consecutive in memory, and every
// lane has the first token of its run. Otherwise a lane has token lane % kTokens.
template <int kTokens>
__device__ __forceinline__ TokenPlace find_tile(const AttnCudaParams& p, const WorkChunk& w, int t) {
  const int lane = threadIdx.x % kTokens;
  if (!p.whole_pages) return find_token(p, w, t + lane);
  // A run may begin before the chunk, in the same page.
  const int run = t + lane / 16 * 16;
  const int before = run < w.token_begin && run + 16 > w.token_begin ? w.token_begin - run : 0;
  TokenPlace place = find_token(p, w, run + before);
  place.slot -= before;
  return place;
}

// Starts copying tokens t .. t + kTokens - 1 of each source into its tile; kThreads threads copy 16 bytes
// each at a time. Channels beyond head_dim, tokens outside the chunk and pages out of range become zeros.
// Sets `bad` if there is such a page.
template <typename T, int kD, int kSources, int kTokens, int kThreads>
__device__ __forceinline__ void copy_tile(const AttnCudaParams& p, const WorkChunk& w,
                                          const CacheTensor* caches, int head_dim, uint32_t tiles, int t,
                                          TokenPlace place, int thread, bool* bad) {
  constexpr int kVectors = kD / 8, kTileBytes = kTokens * kD * 2;
  constexpr int kStep = kThreads / kVectors;  // tokens that the threads copy at a time
  const int first = thread / kVectors, vector = thread % kVectors;
  const int tokens = vector * 8 < head_dim ? w.token_end - w.token_begin : 0;
  const auto copy = [&](const T* from, int j, int token, bool there) {
    ptx::cp_async_16(tile_address<kD>(tiles + j * kTileBytes, token, vector), from + vector * 8,
                     there ? 16 : 0);
  };
  if (p.whole_pages) {
#pragma unroll
    for (int run = 0; run < kTokens; run += 16) {
      TokenPlace at = place;
      if (kTokens > 16) {
        at.row = __shfl_sync(kFullWarp, place.row, run);
        at.slot = __shfl_sync(kFullWarp, place.slot, run);
      }
      const unsigned there = exists(p, at, bad) ? tokens : 0;
      at.slot += first;
#pragma unroll
      for (int j = 0; j < kSources; ++j) {
        const T* from = token_data<T>(caches[j], w.g, at);
#pragma unroll
        for (int i = 0; i < 16; i += kStep, from += kStep * caches[j].stride_t)
          copy(from, j, run + i + first, unsigned(t + run + i + first - w.token_begin) < there);
      }
    }
  } else {
#pragma unroll 2
    for (int i = first; i < kTokens; i += kStep) {
      TokenPlace at;
      at.row = __shfl_sync(kFullWarp, place.row, i);
      at.slot = __shfl_sync(kFullWarp, place.slot, i);
      const bool there = exists(p, at, bad) && tokens > 0;
#pragma unroll
      for (int j = 0; j < kSources; ++j) copy(token_data<T>(caches[j], w.g, at), j, i, there);
    }
  }
}

// The channels of a query row; nullptr for rows beyond the last.
template <typename T>
__device__ __forceinline__ const T* query_data(const AttnCudaParams& p, const WorkChunk& w, int row) {
  if (row >= w.num_rows) return nullptr;
  const QueryRow at = query_row(p, w.g, row);
  return static_cast<const T*>(p.attn.q) + query_offset(p.attn, w.b, w.queries.first, at.s, at.h);
}

// q (.) a of two adjacent channels, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t folded_pair(uint32_t q, float a0, float a1) {
  return pack(widen(T{uint16_t(q)}) * a0, widen(T{uint16_t(q >> 16)}) * a1, T{});
}

// b_j of a KV head; nullptr: all ones.
__device__ __forceinline__ const float* value_weights(const AttnDecodeParams& p, int j, int g) {
  return p.value_weights ? p.value_weights + (j * p.G + g) * p.Dv : nullptr;
}

}  // namespace fusedkv
