// The two matrix products of cached attention on the CPU: scores = q K^T and output = p V, for a few rows and
// one block.
//
// Two ways: any level widens to fp32 and uses fma; AVX-512-BF16 multiplies bf16 pairs with dpbf16, q (.) a_j
// and the probabilities rounded to bf16. Both have the same interface, which attn_decode_cpu.cpp takes as a
// template argument:
//
//   Element, Query        what the cache holds and what q (.) a_j is kept as
//   kPad                  head dims of the scratch are rounded up to this
//   store_query           q (.) a_j from float
//   scores<RT>            s[r][i] = sum_j q_j[r] . k_j[i]    for RT rows and kBlock tokens
//   values<RT>            o[r] += sum_i p[r][i] v[i]         for RT rows; o in an order of channels of its
//   own output                channel d of o
#pragma once

#include "kernels/cpu_simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fusedkv {
namespace FUSEDKV_LEVEL {

// Tokens that stay in L1 between the two products.
constexpr int kBlock = 32;

// Vectors of channels that p V sums side by side: a sum over tokens is one chain of additions, and with few
// rows one chain would leave the multipliers waiting for it.
template <int RT>
constexpr int kChains = RT >= 4 ? 1 : 4 / RT;

// ---- the two products, fp32 ---------------------------------------------------------------------

// Operands of the fp32 way: q as float, probabilities as float, output channels in their order.
template <typename T>
struct Fp32Products {
  using Element = T;
  using Query = float;
  static constexpr int kPad = kLanes;  // head dims of the scratch are rounded up to this

  static void store_query(Query* q, const float* x, int64_t n) {
    for (int64_t d = 0; d < n; ++d) q[d] = x[d];
  }

  // s[r][i] = sum_j q_j[r] . k_j[i] for RT rows and kBlock tokens.
  template <int RT>
  static void scores(float* s, const Query* q, int64_t q_source, int64_t Dp, const T* const (*k)[kBlock],
                     int m, int64_t D) {
    for (int first = 0; first < kBlock; first += kLanes) {
      Vec sums[RT][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        Vec acc[RT];
        for (int r = 0; r < RT; ++r) acc[r] = zero();
        for (int j = 0; j < m; ++j) {
          const T* key = k[j][first + i];
          const Query* qj = q + j * q_source;
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
  static void values(float* o, int64_t Dp, const float* p, const T* const* v, int64_t D) {
    constexpr int NC = kChains<RT>;
    int64_t d = 0;
    for (; d + NC * kLanes <= D; d += NC * kLanes) channels<RT, NC>(o + d, Dp, p, v, d, kLanes);
    for (; d < D; d += kLanes) channels<RT, 1>(o + d, Dp, p, v, d, int(D - d < kLanes ? D - d : kLanes));
  }

  // NC vectors of channels from d on, the last one (then the only one) with n lanes.
  template <int RT, int NC>
  static void channels(float* o, int64_t Dp, const float* p, const T* const* v, int64_t d, int n) {
    Vec acc[RT][NC];
    for (int r = 0; r < RT; ++r)
      for (int c = 0; c < NC; ++c) acc[r][c] = load(o + r * Dp + c * kLanes);
    for (int i = 0; i < kBlock; ++i) {
      for (int c = 0; c < NC; ++c) {
        const T* from = v[i] + d + c * kLanes;
        const Vec x = n == kLanes ? load(from) : load(from, n);
        for (int r = 0; r < RT; ++r) acc[r][c] = fma(set1(p[r * kBlock + i]), x, acc[r][c]);
      }
    }
    for (int r = 0; r < RT; ++r)
      for (int c = 0; c < NC; ++c) store(o + r * Dp + c * kLanes, acc[r][c]);
  }

  static float output(const float* o, int64_t d) { return o[d]; }
};

// ---- the two products, bf16 pairs ---------------------------------------------------------------

#if defined(__AVX512BF16__)

struct Bf16Products {
  using Element = bf16;
  using Query = bf16;
  static constexpr int kPad = 32;

  static void store_query(Query* q, const float* x, int64_t n) {
    for (int64_t d = 0; d < n; ++d) narrow(x[d], q + d);
  }

  static __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh pairs(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1u, p);
  }

  template <int RT>
  static void scores(float* s, const Query* q, int64_t q_source, int64_t Dp, const bf16* const (*k)[kBlock],
                     int m, int64_t D) {
    for (int first = 0; first < kBlock; first += kLanes) {
      Vec sums[RT][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        __m512 acc[RT];
        for (int r = 0; r < RT; ++r) acc[r] = _mm512_setzero_ps();
        for (int j = 0; j < m; ++j) {
          const bf16* key = k[j][first + i];
          const Query* qj = q + j * q_source;
          int64_t d = 0;
          for (; d + 32 <= D; d += 32) {
            const __m512bh x = pairs(key + d);
            for (int r = 0; r < RT; ++r) acc[r] = _mm512_dpbf16_ps(acc[r], pairs(qj + r * Dp + d), x);
          }
          if (d < D) {
            const __m512bh x = pairs(key + d, D - d);
            for (int r = 0; r < RT; ++r) acc[r] = _mm512_dpbf16_ps(acc[r], pairs(qj + r * Dp + d), x);
          }
        }
        for (int r = 0; r < RT; ++r) sums[r][i] = {acc[r]};
      }
      for (int r = 0; r < RT; ++r) store(s + r * kBlock + first, reduce_add_each(sums[r]));
    }
  }

  // dpbf16 adds products of neighbours, here of two tokens: unpacklo/hi pair the channels of tokens i and i
  // + 1. They leave the 32 channels of a step in the order that output() undoes.
  template <int RT>
  static void values(float* o, int64_t Dp, const float* p, const bf16* const* v, int64_t D) {
    uint32_t pair[RT][kBlock / 2];
    for (int r = 0; r < RT; ++r) {
      bf16 rounded[kBlock];
      for (int i = 0; i < kBlock; i += kLanes) store(rounded + i, load(p + r * kBlock + i));
      __builtin_memcpy(pair[r], rounded, sizeof(rounded));
    }
    constexpr int NC = kChains<RT>;
    int64_t d = 0;
    for (; d + NC * 32 <= D; d += NC * 32) channels<RT, NC>(o + d, Dp, pair, v, d, 32);
    for (; d < D; d += 32) channels<RT, 1>(o + d, Dp, pair, v, d, D - d < 32 ? D - d : 32);
  }

  // NC steps of 32 channels from d on, the last one (then the only one) with n channels.
  template <int RT, int NC>
  static void channels(float* o, int64_t Dp, const uint32_t (*pair)[kBlock / 2], const bf16* const* v,
                       int64_t d, int64_t n) {
    __m512 low[RT][NC], high[RT][NC];
    for (int r = 0; r < RT; ++r) {
      for (int c = 0; c < NC; ++c) {
        low[r][c] = _mm512_loadu_ps(o + r * Dp + c * 32);
        high[r][c] = _mm512_loadu_ps(o + r * Dp + c * 32 + 16);
      }
    }
    for (int i = 0; i < kBlock; i += 2) {
      for (int c = 0; c < NC; ++c) {
        const bf16 *even = v[i] + d + c * 32, *odd = v[i + 1] + d + c * 32;
        const __m512i x = (__m512i)(n == 32 ? pairs(even) : pairs(even, n));
        const __m512i y = (__m512i)(n == 32 ? pairs(odd) : pairs(odd, n));
        const __m512bh xy_low = (__m512bh)_mm512_unpacklo_epi16(x, y);
        const __m512bh xy_high = (__m512bh)_mm512_unpackhi_epi16(x, y);
        for (int r = 0; r < RT; ++r) {
          const __m512bh pp = (__m512bh)_mm512_set1_epi32(int(pair[r][i / 2]));
          low[r][c] = _mm512_dpbf16_ps(low[r][c], pp, xy_low);
          high[r][c] = _mm512_dpbf16_ps(high[r][c], pp, xy_high);
        }
      }
    }
    for (int r = 0; r < RT; ++r) {
      for (int c = 0; c < NC; ++c) {
        _mm512_storeu_ps(o + r * Dp + c * 32, low[r][c]);
        _mm512_storeu_ps(o + r * Dp + c * 32 + 16, high[r][c]);
      }
    }
  }

  // Channel 8 k + i of a step of 32 stands at lane 4 k + i of `low` (i < 4) or 4 k + i - 4 of `high`.
  static float output(const float* o, int64_t d) {
    const int64_t c = d % 32, i = c % 8;
    return o[d - c + (c / 8) * 4 + i % 4 + (i < 4 ? 0 : 16)];
  }
};

#endif

}  // namespace FUSEDKV_LEVEL
}  // namespace fusedkv
