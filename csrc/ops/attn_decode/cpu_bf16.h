// The two products of cached attention on the CPU over bf16: on AVX2 words that are widened without moving
// data across lanes, on AVX-512-BF16 pairs for dpbf16, on AMX tiles. Pairs and tiles round q (.) a_j and the
// probabilities to bf16. The interface is that of cpu_products.h.
#pragma once

#include "ops/attn_decode/cpu_products.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(FUSEDKV_AMX)
#include "cpu/simd/amx.h"
#endif

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// ---- words: AVX2 --------------------------------------------------------------------------------

#if defined(__AVX2__) && !defined(__AVX512F__)

// A 32-bit word has channels 2 c and 2 c + 1. A shift widens one of them, a mask the other. So in each kStep
// channels q and the output have the even ones first. q is (D / kStep, rows, kStep): the loop over channels
// needs one address.
struct Bf16Words : RowByRow<Bf16Words, bf16, float> {
  static constexpr int kStep = 2 * kLanes, kPad = kStep;

  static void store_query(float* q, int64_t r, int64_t rows, const float* x, int64_t Dp) {
    for (int64_t d = 0; d < Dp; d += kStep) {
      float* to = q + d * rows + r * kStep;
      for (int c = 0; c < kStep; ++c) to[c % 2 * kLanes + c / 2] = x[d + c];
    }
  }

  static void scores(float* s, const float* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                     Ahead& ahead, int m, int64_t D, int64_t Dp) {
    for_row_tiles<8>(rows, [&](int64_t r, auto tile) {
      row_scores<tile.rows>(s + r * kBlock, q + r * kStep, rows, Dp, k, offsets, ahead, m, D);
    });
  }

  // s[r][i] = sum_j q_j[r] . k_j[i] for RT rows and kBlock tokens. Eight sums hide the latency of fma. In a
  // function of its own, because gcc 12 would spill them in a larger one.
  template <int RT>
  __attribute__((noinline)) static void row_scores(float* s, const float* q, int64_t rows, int64_t Dp,
                                                   const BlockRows* k, const int64_t* offsets, Ahead& ahead,
                                                   int m, int64_t D) {
    constexpr int kTokens = RT == 1 ? 4 : 8 / RT, kSums = RT == 1 ? 2 : 1;
    for (int first = 0; first < kBlock; first += kLanes) {
      Vec sums[RT][kLanes];
      for (int i = 0; i < kLanes; i += kTokens) {
        Vec acc[kTokens][RT][kSums];
        for (int t = 0; t < kTokens; ++t)
          for (int r = 0; r < RT; ++r)
            for (int c = 0; c < kSums; ++c) acc[t][r][c] = zero();
        for (int j = 0; j < m; ++j) {
          const char* const* key = k[j].row + first + i;
          const int64_t offset = offsets[j] * int64_t(sizeof(bf16));
          const float* qj = q + j * rows * Dp;
          if (RT > 1) ahead.bytes(kTokens * D * int64_t(sizeof(bf16)));
          const auto step = [&](int64_t d, int n) {
            const float* x = qj + d * rows;
            if (RT == 1) ahead.bytes(kTokens * n * int64_t(sizeof(bf16)));
            for (int t = 0; t < kTokens; ++t) {
              Vec even, odd;
              const bf16* from = (const bf16*)(key[t] + offset) + d;
              if (n == kStep)
                load_words(from, &even, &odd);
              else
                load_words(from, n, &even, &odd);
              for (int r = 0; r < RT; ++r) {
                acc[t][r][0] = fma(load(x + r * kStep), even, acc[t][r][0]);
                acc[t][r][kSums - 1] = fma(load(x + r * kStep + kLanes), odd, acc[t][r][kSums - 1]);
              }
            }
          };
          int64_t d = 0;
#pragma GCC unroll 1
          for (; d + kStep <= D; d += kStep) step(d, kStep);
          if (d < D) step(d, int(D - d));
        }
        for (int t = 0; t < kTokens; ++t)
          for (int r = 0; r < RT; ++r)
            sums[r][i + t] = kSums == 2 ? add(acc[t][r][0], acc[t][r][kSums - 1]) : acc[t][r][0];
      }
      for (int r = 0; r < RT; ++r) store(s + r * kBlock + first, reduce_add_each(sums[r]));
    }
  }

  static void values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset, Ahead& ahead,
                     int64_t D, int64_t Dp) {
    Ahead none;
    for_row_tiles<4>(rows, [&](int64_t r, auto tile) {
      row_values<tile.rows>(o + r * Dp, Dp, p + r * kBlock, v, offset, r == 0 ? ahead : none, D);
    });
  }

  // o[r] += sum_i p[r][i] v[i] for RT rows.
  template <int RT>
  static void row_values(float* o, int64_t Dp, const float* p, const BlockRows& v, int64_t offset,
                         Ahead& ahead, int64_t D) {
    constexpr int NC = kChains<RT>;
    int64_t d = 0;
    for (; d + NC * kStep <= D; d += NC * kStep)
      channels<RT, NC, true>(o + d, Dp, p, v, offset + d, ahead, kStep);
    for (; d + kStep <= D; d += kStep) channels<RT, 1, true>(o + d, Dp, p, v, offset + d, ahead, kStep);
    if (d < D) channels<RT, 1, false>(o + d, Dp, p, v, offset + d, ahead, int(D - d));
  }

  // NC steps of channels from d on. Without kWhole it is one of n channels.
  template <int RT, int NC, bool kWhole>
  __attribute__((noinline)) static void channels(float* o, int64_t Dp, const float* p, const BlockRows& v,
                                                 int64_t d, Ahead& ahead, int n) {
    Vec even[RT][NC], odd[RT][NC];
    for (int r = 0; r < RT; ++r) {
      for (int c = 0; c < NC; ++c) {
        even[r][c] = load(o + r * Dp + c * kStep);
        odd[r][c] = load(o + r * Dp + c * kStep + kLanes);
      }
    }
    const auto add_token = [&](int i) {
      const bf16* from = v.at<bf16>(i, d);
      for (int c = 0; c < NC; ++c) {
        Vec x, y;
        if (kWhole)
          load_words(from + c * kStep, &x, &y);
        else
          load_words(from, n, &x, &y);
        for (int r = 0; r < RT; ++r) {
          const Vec probability = set1(p[r * kBlock + i]);
          even[r][c] = fma(probability, x, even[r][c]);
          odd[r][c] = fma(probability, y, odd[r][c]);
        }
      }
    };
    constexpr int kRun = RT == 1 ? 2 : RT == 2 ? kBlock / 2 : kBlock;
#pragma GCC unroll 1
    for (int begin = 0; begin < kBlock; begin += kRun) {
      ahead.bytes(kRun * NC * kStep * int64_t(sizeof(bf16)));
#pragma GCC unroll 1
      for (int i = begin; i < begin + kRun; i += 2) {
        add_token(i);
        add_token(i + 1);
      }
    }
    for (int r = 0; r < RT; ++r) {
      for (int c = 0; c < NC; ++c) {
        store(o + r * Dp + c * kStep, even[r][c]);
        store(o + r * Dp + c * kStep + kLanes, odd[r][c]);
      }
    }
  }

  static void order_channels(float* o, int64_t Dp) {
    for (int64_t d = 0; d < Dp; d += kStep) {
      float ordered[kStep];
      for (int c = 0; c < kStep; ++c) ordered[c] = o[d + c % 2 * kLanes + c / 2];
      for (int c = 0; c < kStep; ++c) o[d + c] = ordered[c];
    }
  }
};

#endif

// ---- pairs: AVX-512-BF16 ------------------------------------------------------------------------

#if defined(__AVX512BF16__)

struct Bf16Products : RowByRow<Bf16Products, bf16, bf16> {
  static constexpr int kPad = 32;

  static __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh pairs(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1u, p);
  }

  template <int RT>
  static void row_scores(float* s, const bf16* q, int64_t q_source, int64_t Dp, const BlockRows* k,
                         const int64_t* offsets, Ahead& ahead, int m, int64_t D) {
    for (int first = 0; first < kBlock; first += kLanes) {
      Vec sums[RT][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        __m512 acc[RT];
        for (int r = 0; r < RT; ++r) acc[r] = _mm512_setzero_ps();
        for (int j = 0; j < m; ++j) {
          const bf16* key = k[j].at<bf16>(first + i, offsets[j]);
          const bf16* qj = q + j * q_source;
          ahead.bytes(D * 2);
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

  // dpbf16 adds products of adjacent elements, here of two tokens: unpacklo/hi pair the channels of tokens i
  // and i + 1. They leave the 32 channels of a step in an order that order_channels restores.
  template <int RT>
  static void row_values(float* o, int64_t Dp, const float* p, const BlockRows& v, int64_t offset,
                         Ahead& ahead, int64_t D) {
    uint32_t pair[RT][kBlock / 2];
    for (int r = 0; r < RT; ++r) {
      bf16 rounded[kBlock];
      for (int i = 0; i < kBlock; i += kLanes) store(rounded + i, load(p + r * kBlock + i));
      __builtin_memcpy(pair[r], rounded, sizeof(rounded));
    }
    constexpr int NC = kChains<RT>;
    int64_t d = 0;
    for (; d + NC * 32 <= D; d += NC * 32) channels<RT, NC>(o + d, Dp, pair, v, offset + d, ahead, 32);
    for (; d < D; d += 32) channels<RT, 1>(o + d, Dp, pair, v, offset + d, ahead, D - d < 32 ? D - d : 32);
  }

  // NC steps of 32 channels from d on, the last one (then the only one) with n channels.
  template <int RT, int NC>
  static void channels(float* o, int64_t Dp, const uint32_t (*pair)[kBlock / 2], const BlockRows& v,
                       int64_t d, Ahead& ahead, int64_t n) {
    __m512 low[RT][NC], high[RT][NC];
    for (int r = 0; r < RT; ++r) {
      for (int c = 0; c < NC; ++c) {
        low[r][c] = _mm512_loadu_ps(o + r * Dp + c * 32);
        high[r][c] = _mm512_loadu_ps(o + r * Dp + c * 32 + 16);
      }
    }
    for (int i = 0; i < kBlock; i += 2) {
      ahead.bytes(2 * NC * 64);
      for (int c = 0; c < NC; ++c) {
        const bf16 *even = v.at<bf16>(i, d + c * 32), *odd = v.at<bf16>(i + 1, d + c * 32);
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

  // Channel 8 k + i of a step of 32 is in lane 4 k + i of `low` (i < 4) or 4 k + i - 4 of `high`.
  static void order_channels(float* o, int64_t Dp) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t d = 0; d < Dp; d += 32) {
      const __m512 low = _mm512_loadu_ps(o + d), high = _mm512_loadu_ps(o + d + 16);
      _mm512_storeu_ps(o + d, _mm512_permutex2var_ps(low, first, high));
      _mm512_storeu_ps(o + d + 16, _mm512_permutex2var_ps(low, second, high));
    }
  }
};

#endif

// ---- tiles: AMX ---------------------------------------------------------------------------------

#if defined(FUSEDKV_AMX)

// For D and Dv that are multiples of 32. The scores are computed transposed, keys times queries: a tile of
// keys can then be loaded directly from the cache, one row per token. Values are paired as in Bf16Products
// before they go into a tile. Both cost the same for 1 and for 16 query rows.
struct AmxProducts {
  using Element = bf16;
  using Query = bf16;  // (row tiles, D / 32, 16 pairs of channels, rows of the tile, 2)
  static constexpr bool kCoded = false;
  static constexpr int kPad = 32;
  static constexpr int kTileRows = 16;

  // Tile registers.
  static constexpr int kS0 = 0, kS1 = 1, kK = 2, kQ = 3, kP = 4, kV = 5, kO0 = 6, kO1 = 7;

  static int64_t padded_rows(int64_t rows) {
    return rows <= kTileRows ? rows : (rows + kTileRows - 1) / kTileRows * kTileRows;
  }

  static int64_t tile_rows(int64_t rows) { return rows < kTileRows ? rows : kTileRows; }

  static void begin_task(int64_t rows) {
    const int64_t n = tile_rows(rows);
    TileShapes shapes;
    shapes.set(kS0, kTileRows, 4 * n);
    shapes.set(kS1, kTileRows, 4 * n);
    shapes.set(kK, kTileRows, 64);
    shapes.set(kQ, kTileRows, 4 * n);
    shapes.set(kP, n, 64);
    shapes.set(kV, kTileRows, 64);
    shapes.set(kO0, n, 64);
    shapes.set(kO1, n, 64);
    tile_configure(shapes);
  }

  static void end() { tile_release(); }

  // Scores, softmax, pairing and the product of values prefetch a quarter each.
  static int64_t softmax_bytes(int m, int64_t D, int64_t rows) { return 16 * m * D * 2 / rows; }

  static void store_query(Query* q, int64_t r, int64_t rows, const float* x, int64_t Dp) {
    const int64_t n = tile_rows(rows);
    bf16 rounded[kMaxHeadDim];
    for (int64_t d = 0; d < Dp; d += kLanes) store(rounded + d, load(x + d));
    Query* tile = q + r / kTileRows * kTileRows * Dp + r % kTileRows * 2;
    for (int64_t d = 0; d < Dp; d += 2) __builtin_memcpy(tile + d * n, rounded + d, 4);
  }

  static void scores(float* s, const Query* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                     Ahead& ahead, int m, int64_t D, int64_t Dp) {
    const int64_t n = tile_rows(rows);
    for (int64_t first = 0; first < rows; first += kTileRows) {
      tile_zero<kS0>();
      tile_zero<kS1>();
      for (int j = 0; j < m; ++j) {
        alignas(64) bf16 gathered[kTileRows * kMaxHeadDim];
        const Query* tile = q + (j * rows + first) * Dp;
        const Keys k0 = keys_of(k[j].row, offsets[j]), k1 = keys_of(k[j].row + kTileRows, offsets[j]);
        if (k0.stride && k1.stride) {
          for (int64_t d = 0; d < D; d += 32) {
            tile_load<kQ>(tile + d * n, 4 * n);
            ahead.bytes(8 * 64);
            tile_load<kK>(k0.data + d, k0.stride);
            tile_dpbf16<kS0, kK, kQ>();
            ahead.bytes(8 * 64);
            tile_load<kK>(k1.data + d, k1.stride);
            tile_dpbf16<kS1, kK, kQ>();
          }
          continue;
        }
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < kTileRows; ++i)
            __builtin_memcpy(gathered + i * D, k[j].at<bf16>(half * kTileRows + i, offsets[j]),
                             size_t(D) * 2);
          for (int64_t d = 0; d < D; d += 32) {
            tile_load<kQ>(tile + d * n, 4 * n);
            tile_load<kK>(gathered + d, D * 2);
            if (half)
              tile_dpbf16<kS1, kK, kQ>();
            else
              tile_dpbf16<kS0, kK, kQ>();
          }
        }
      }
      alignas(64) float transposed[2 * kTileRows][kTileRows];
      tile_store<kS0>(transposed[0], 64);
      tile_store<kS1>(transposed[kTileRows], 64);
      transpose(transposed[0], s + first * kBlock, n);
      transpose(transposed[kTileRows], s + first * kBlock + kTileRows, n);
    }
  }

  static void values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset, Ahead& ahead,
                     int64_t D, int64_t Dp) {
    alignas(64) bf16 pairs[kMaxHeadDim / 16][kBlock / 2][32];
    for (int i = 0; i < kBlock; i += 2) {
      const bf16 *even = v.at<bf16>(i, offset), *odd = v.at<bf16>(i + 1, offset);
      ahead.bytes(D * 2);
      for (int64_t d = 0; d < D; d += 32) {
        const __m512i x = _mm512_loadu_si512(even + d), y = _mm512_loadu_si512(odd + d);
        _mm512_store_si512(pairs[d / 16][i / 2], _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(pairs[d / 16 + 1][i / 2], _mm512_unpackhi_epi16(x, y));
      }
    }
    const int64_t n = tile_rows(rows), stride = Dp * int64_t(sizeof(float));
    for (int64_t first = 0; first < rows; first += kTileRows) {
      alignas(64) bf16 rounded[kTileRows][kBlock];
      for (int64_t r = 0; r < n; ++r)
        for (int i = 0; i < kBlock; i += kLanes) store(rounded[r] + i, load(p + (first + r) * kBlock + i));
      tile_load<kP>(rounded, 64);
      float* out = o + first * Dp;
      for (int64_t d = 0; d < D; d += 32) {
        ahead.bytes(16 * 64);
        tile_load<kO0>(out + d, stride);
        tile_load<kV>(pairs[d / 16], 64);
        tile_dpbf16<kO0, kP, kV>();
        tile_load<kO1>(out + d + 16, stride);
        tile_load<kK>(pairs[d / 16 + 1], 64);
        tile_dpbf16<kO1, kP, kK>();
        tile_store<kO0>(out + d, stride);
        tile_store<kO1>(out + d + 16, stride);
      }
    }
  }

  static void order_channels(float* o, int64_t Dp) { Bf16Products::order_channels(o, Dp); }

 private:
  // 16 tokens at a fixed distance, stride in bytes; 0: there is none.
  struct Keys {
    const bf16* data;
    int64_t stride;
  };

  static Keys keys_of(const char* const* row, int64_t offset) {
    const int64_t stride = row[1] - row[0];
    for (int i = 2; i < kTileRows; ++i)
      if (row[i] - row[i - 1] != stride) return {nullptr, 0};
    return {(const bf16*)row[0] + offset, stride};
  }

  // to[r * kBlock + i] = from[16 i + r] for r < rows.
  static void transpose(const float* from, float* to, int64_t rows) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from + 16 * i);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    const auto pd = [](__m512 x) { return _mm512_castps_pd(x); };
    for (int i = 0; i < 16; i += 4) {  // quarter q of a[i + c]: row 4 q + c of tokens i .. i + 3
      a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(b[i]), pd(b[i + 2])));
      a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(b[i]), pd(b[i + 2])));
      a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(b[i + 1]), pd(b[i + 3])));
      a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(b[i + 1]), pd(b[i + 3])));
    }
    for (int c = 0; c < 4; ++c) {  // a 4 x 4 transpose of quarters
      const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88),
                   odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88),
                   odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
      b[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      b[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      b[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      b[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    for (int64_t r = 0; r < rows; ++r) _mm512_storeu_ps(to + r * kBlock, b[r]);
  }
};

#endif

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
