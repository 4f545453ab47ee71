// The two matrix products of cached attention on the CPU: scores = q K^T and output = p V, for the rows of
// one KV head and one block of tokens.
//
// Every SIMD target has the implementation that is here: it widens to fp32 and uses fma. Those of cpu_bf16.h
// and cpu_codes.h have the same interface, which cpu.cpp takes as a template argument:
//
//   Element, Query        types of q and the cache, and of q (.) a_j
//   kCoded                whether it is that of cpu_codes.h, which has a state
//   kPad                  head dims of the scratch are rounded up to this
//   padded_rows           rows of the scratch
//   begin_task, end       before the products of a task with so many rows; after the last one
//   softmax_bytes         bytes to prefetch after the softmax of a row
//   store_query           row r of q (.) a_j from float
//   scores                s[r][i] = sum_j q_j[r] . k_j[i]    for kBlock tokens
//   values                o[r] += sum_i p[r][i] v[i]         channels of o in an internal order
//   order_channels        restores the order of the Dp channels of a row of o
#pragma once

#include "common/limits.h"
#include "cpu/simd.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// Tokens that stay in L1 between the two products.
constexpr int kBlock = 32;

// The addresses of a block's tokens: the first channel of each, in the first KV head of a task.
struct BlockRows {
  const char* row[kBlock];

  // Token i, `offset` elements further.
  template <typename T>
  const T* at(int i, int64_t offset) const {
    return (const T*)row[i] + offset;
  }
};

// Prefetches the next block during this one. Evenly, because a burst of prefetches delays the loads behind it
// and a pause leaves the memory idle. From kStreams places in turn: how many a machine reads fastest from is
// measured. It is 8 on Xeon and EPYC with AVX-512, where the prefetcher of L2 follows one stream per page,
// and 2 on EPYC without.
class Ahead {
 public:
  // rows: the tokens of one side, kBlock per source, each `bytes` long.
  void add(const char* const* rows, int64_t count, int64_t bytes) {
    sides_[num_sides_++] = {rows, count / kStreams, bytes};
    if (num_sides_ == 1) first_ = rows, rows_ = count / kStreams;
  }

  void bytes(int64_t n) {
    for (due_ += n; due_ >= 64 * kStreams && rows_ > 0; due_ -= 64 * kStreams) {
      const Side& side = sides_[side_];
      for (int i = 0; i < kStreams; ++i) __builtin_prefetch(first_[i * side.rows] + at_, 0, 2);
      at_ += 64;
      if (at_ < side.bytes) continue;
      at_ = 0, ++first_, --rows_;
      if (rows_ == 0 && ++side_ < num_sides_) first_ = sides_[side_].first, rows_ = sides_[side_].rows;
    }
  }

 private:
#if defined(__AVX512F__)
  static constexpr int kStreams = 8;
#else
  static constexpr int kStreams = 2;
#endif

  struct Side {
    const char* const* first;
    int64_t rows;  // of a stream
    int64_t bytes;
  };
  Side sides_[2];  // keys, values
  int num_sides_ = 0, side_ = 0;
  const char* const* first_ = nullptr;  // row of the first stream
  int64_t rows_ = 0, at_ = 0;           // rows left, bytes of this one prefetched
  int64_t due_ = 0;                     // bytes due and not yet prefetched
};

// Around an inner loop of prefetches gcc 12 keeps sums in memory. With 16 registers it pays to prefetch
// before the sums, for a whole block: with four rows or more they take long enough that this is still even.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kPrefetchesFirst = true;
#else
constexpr bool kPrefetchesFirst = false;
#endif

// Vectors of channels that p V sums concurrently. A sum over tokens is one dependent chain of additions; with
// few rows, one chain would leave the multipliers idle.
template <int RT>
constexpr int kChains = RT >= 4 ? 1 : 4 / RT;

// Calls fn(d, n) for each vector of n channels: kLanes, or the rest.
template <typename Fn>
inline void for_lanes(int64_t D, const Fn& fn) {
  for (int64_t d = 0; d < D; d += kLanes) fn(d, int(D - d < kLanes ? D - d : kLanes));
}

template <int N>
struct RowTile {
  static constexpr int rows = N;
};

// Calls fn(r, tile) for tiles of 8 (if kMost is), 4, 2 or 1 rows. The rows of a tile share a loaded key or
// value in registers.
template <int kMost, typename Fn>
inline void for_row_tiles(int64_t rows, const Fn& fn) {
  int64_t r = 0;
  if constexpr (kMost == 8)
    for (; r + 8 <= rows; r += 8) fn(r, RowTile<8>{});
  for (; r + 4 <= rows; r += 4) fn(r, RowTile<4>{});
  if (r + 2 <= rows) fn(r, RowTile<2>{}), r += 2;
  if (r + 1 <= rows) fn(r, RowTile<1>{}), r += 1;
}

// The common part of the implementations that store q row by row. Products has row_scores<RT> and
// row_values<RT> for RT rows.
template <typename Products, typename T, typename Q>
struct RowByRow {
  using Element = T;
  using Query = Q;
  static constexpr bool kCoded = false;

  static int64_t padded_rows(int64_t rows) { return rows; }
  static void begin_task(int64_t) {}
  static int64_t softmax_bytes(int, int64_t, int64_t) { return 0; }
  static void end() {}

  static void store_query(Query* q, int64_t r, int64_t, const float* x, int64_t Dp) {
    for (int64_t d = 0; d < Dp; d += kLanes) store(q + r * Dp + d, load(x + d));
  }

  // k: m sources; `offsets` from the first head of the task to this one.
  static void scores(float* s, const Query* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                     Ahead& ahead, int m, int64_t D, int64_t Dp) {
    for_row_tiles<8>(rows, [&](int64_t r, auto tile) {
      Products::template row_scores<tile.rows>(s + r * kBlock, q + r * Dp, rows * Dp, Dp, k, offsets, ahead,
                                               m, D);
    });
  }

  static void values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset, Ahead& ahead,
                     int64_t D, int64_t Dp) {
    for_row_tiles<8>(rows, [&](int64_t r, auto tile) {
      Products::template row_values<tile.rows>(o + r * Dp, Dp, p + r * kBlock, v, offset, ahead, D);
    });
  }
};

// ---- the two products, fp32 ---------------------------------------------------------------------

// q and probabilities are float; output channels are in their order.
template <typename T>
struct Fp32Products : RowByRow<Fp32Products<T>, T, float> {
  static constexpr int kPad = kLanes;

  // s[r][i] = sum_j q_j[r] . k_j[i] for RT rows and kBlock tokens.
  template <int RT>
  static void row_scores(float* s, const float* q, int64_t q_source, int64_t Dp, const BlockRows* k,
                         const int64_t* offsets, Ahead& ahead, int m, int64_t D) {
    for (int first = 0; first < kBlock; first += kLanes) {
      Vec sums[RT][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        Vec acc[RT];
        for (int r = 0; r < RT; ++r) acc[r] = zero();
        for (int j = 0; j < m; ++j) {
          const T* key = k[j].at<T>(first + i, offsets[j]);
          const float* qj = q + j * q_source;
          ahead.bytes(D * int64_t(sizeof(T)));
          int64_t d = 0;
          for (; d + kLanes <= D; d += kLanes) {
            const Vec x = load(key + d);
            for (int r = 0; r < RT; ++r) acc[r] = fma(load(qj + r * Dp + d), x, acc[r]);
          }
          if (d < D) {
            const Vec x = load(key + d, int(D - d));
            for (int r = 0; r < RT; ++r) acc[r] = fma(load(qj + r * Dp + d), x, acc[r]);
          }
        }
        for (int r = 0; r < RT; ++r) sums[r][i] = acc[r];
      }
      for (int r = 0; r < RT; ++r) store(s + r * kBlock + first, reduce_add_each(sums[r]));
    }
  }

  // o[r] += sum_i p[r][i] v[i] for RT rows.
  template <int RT>
  static void row_values(float* o, int64_t Dp, const float* p, const BlockRows& v, int64_t offset,
                         Ahead& ahead, int64_t D) {
    constexpr int NC = kChains<RT>;
    int64_t d = 0;
    for (; d + NC * kLanes <= D; d += NC * kLanes)
      channels<RT, NC>(o + d, Dp, p, v, offset + d, ahead, kLanes);
    for (; d < D; d += kLanes)
      channels<RT, 1>(o + d, Dp, p, v, offset + d, ahead, int(D - d < kLanes ? D - d : kLanes));
  }

  // NC vectors of channels from d on, the last one (then the only one) with n lanes.
  template <int RT, int NC>
  static void channels(float* o, int64_t Dp, const float* p, const BlockRows& v, int64_t d, Ahead& ahead,
                       int n) {
    Vec acc[RT][NC];
    for (int r = 0; r < RT; ++r)
      for (int c = 0; c < NC; ++c) acc[r][c] = load(o + r * Dp + c * kLanes);
    if constexpr (kPrefetchesFirst && RT >= 4 && sizeof(T) == 2) {
      ahead.bytes(kBlock * NC * kLanes * int64_t(sizeof(T)));
#pragma GCC unroll 1
      for (int i = 0; i < kBlock; ++i) {
        const T* from = v.at<T>(i, d);
        const Vec x = n == kLanes ? load(from) : load(from, n);
        for (int r = 0; r < RT; ++r) acc[r][0] = fma(set1(p[r * kBlock + i]), x, acc[r][0]);
      }
    } else {
      for (int i = 0; i < kBlock; ++i) {
        ahead.bytes(NC * kLanes * int64_t(sizeof(T)));
        for (int c = 0; c < NC; ++c) {
          const T* from = v.at<T>(i, d + c * kLanes);
          const Vec x = n == kLanes ? load(from) : load(from, n);
          for (int r = 0; r < RT; ++r) acc[r][c] = fma(set1(p[r * kBlock + i]), x, acc[r][c]);
        }
      }
    }
    for (int r = 0; r < RT; ++r)
      for (int c = 0; c < NC; ++c) store(o + r * Dp + c * kLanes, acc[r][c]);
  }

  static void order_channels(float*, int64_t) {}
};

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
