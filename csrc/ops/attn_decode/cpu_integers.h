// The two products over int8 and 4-bit codes in integers, for 16-bit queries: AVX2, also in the AVX-512
// targets.
//
// A query row is rounded to 16 bits with one scale for all of its sources, and the probabilities of a block
// of tokens to 16 bits relative to their largest. vpmaddwd multiplies and adds pairs; the sums are exact in
// 32 bits. For the keys a pair is two channels of a token, for the values two tokens of a channel.
#pragma once

#include "ops/attn_decode/cpu_products.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// Probabilities of a block, or of a source if its tokens have factors.
struct IntegerProbabilities {
  alignas(64) int16_t rounded[kMaxTaskRows][kBlock];
  float scale[kMaxTaskRows];  // rounded * scale is the probability
  int32_t sum[kMaxTaskRows];
  bool finite;
};

#if defined(__AVX2__)

constexpr int kIntegerPad = 16;      // channels of a load
constexpr float kSmallest = 1e-30f;  // rows of smaller numbers are zeros

// A row of integer queries has the memory of its floats: Dp int16_t, then the scale and the sum of them.
struct RowFacts {
  float scale;
  int32_t sum;
};

inline RowFacts* row_facts(float* row, int64_t Dp) {
  return (RowFacts*)((int16_t*)row + Dp);
}

inline const RowFacts& row_facts(const float* row, int64_t Dp) {
  return *(const RowFacts*)((const int16_t*)row + Dp);
}

inline __m256i abs_bits(const float* x) {
  return _mm256_and_si256(_mm256_loadu_si256((const __m256i*)x), _mm256_set1_epi32(0x7fffffff));
}

// The largest of 8 absolute values; as integers they have the same order, with NaN and infinity on top.
inline uint32_t highest_bits(__m256i x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(y));
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

// 16 floats times a factor, rounded to nearest even.
inline __m256i round16(const float* x, __m256 factor) {
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), factor));
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

// Rounds a row of m sources in place, `stride` floats apart. The products with codes up to 127 of all sources
// fit 32 bits. A row that is not finite has the scale NaN, and so NaN scores.
inline void round_query(float* row, int m, int64_t stride, int64_t Dp) {
  __m256i highest = _mm256_setzero_si256();
  for (int j = 0; j < m; ++j)
    for (int64_t d = 0; d < Dp; d += 8) highest = _mm256_max_epi32(highest, abs_bits(row + j * stride + d));
  const uint32_t bits = highest_bits(highest);
  const float largest = float_of(bits);
  const int64_t fitting = INT32_MAX / (m * Dp * 127), limit = fitting < INT16_MAX ? fitting : INT16_MAX;
  const bool finite = bits < kInfinityBits, zero = largest < kSmallest;
  const __m256 factor = _mm256_set1_ps(!finite || zero ? 0.f : float(limit) / largest);
  const float scale = !finite ? float_of(0x7fc00000u) : zero ? 0.f : largest / float(limit);
  for (int j = 0; j < m; ++j) {
    float* x = row + j * stride;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t d = 0; d < Dp; d += 16) {
      const __m256i rounded = finite ? round16(x + d, factor) : _mm256_setzero_si256();
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(rounded, _mm256_set1_epi16(1)));
      _mm256_storeu_si256((__m256i*)((int16_t*)x + d), rounded);
    }
    alignas(32) int32_t parts[8];
    _mm256_store_si256((__m256i*)parts, sum);
    int32_t total = 0;
    for (int i = 0; i < 8; ++i) total += parts[i];
    *row_facts(x, Dp) = {scale, total};
  }
}

inline void round_probabilities(const float* p, int64_t rows, IntegerProbabilities* to) {
  to->finite = true;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = p + r * kBlock;
    __m256i highest = _mm256_setzero_si256();
    for (int i = 0; i < kBlock; i += 8) highest = _mm256_max_epi32(highest, abs_bits(x + i));
    const uint32_t bits = highest_bits(highest);
    if (bits >= kInfinityBits) {
      to->finite = false;
      return;
    }
    const float largest = float_of(bits);
    const bool zero = largest < kSmallest;
    const __m256 factor = _mm256_set1_ps(zero ? 0.f : float(INT16_MAX) / largest);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < kBlock; i += 16) {
      const __m256i rounded = round16(x + i, factor);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(rounded, _mm256_set1_epi16(1)));
      _mm256_store_si256((__m256i*)(to->rounded[r] + i), rounded);
    }
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e));
    to->sum[r] = _mm_cvtsi128_si32(_mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1)));
    to->scale[r] = zero ? 0.f : largest / float(INT16_MAX);
  }
}

// The first n of 16 bytes, the others zero.
inline __m128i load_bytes(const void* from, int64_t n) {
  if (n >= 16) return _mm_loadu_si128((const __m128i*)from);
  if (n == 8) return _mm_loadl_epi64((const __m128i*)from);
  alignas(16) uint8_t bytes[16] = {};
  __builtin_memcpy(bytes, from, size_t(n));
  return _mm_load_si128((const __m128i*)bytes);
}

// Lane i is the sum of the lanes of x[i].
inline __m256i add_each(const __m256i* x) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// In assembly, because gcc 12 adds into another register and copies it back, in every step of the loops.
inline __m256i add_products(__m256i sum, __m256i x, __m256i y) {
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(x, y)));
  return sum;
}

inline __m256i load16(const int16_t* x) {
  return _mm256_loadu_si256((const __m256i*)x);
}

constexpr int kNear = 4;  // tokens from one to that which it fetches into L1

// How codes become pairs of int16_t. A step is 16 bytes of a key: 16 channels of int8, or 16 of the low and
// 16 of the high halves of bytes, which come from other places of the query and are still off by 8.
struct Int8Codes {
  static constexpr bool kHalves = false;
  using Element = int8_t;
};

struct NibbleCodes {
  static constexpr bool kHalves = true;
  using Element = nibbles;
};

template <typename Codes, int RT>
inline void add_key_step(__m256i* acc, const int16_t* q, int64_t row, int64_t upper, __m128i bytes) {
  if constexpr (Codes::kHalves) {
    const __m256i pairs = _mm256_cvtepu8_epi16(bytes);
    const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(pairs, 4);
    for (int r = 0; r < RT; ++r) {
      acc[r] = add_products(acc[r], load16(q + r * row), low);
      acc[r] = add_products(acc[r], load16(q + r * row + upper), high);
    }
  } else {
    const __m256i x = _mm256_cvtepi8_epi16(bytes);
    for (int r = 0; r < RT; ++r) acc[r] = add_products(acc[r], load16(q + r * row), x);
  }
}

// s[r][i] = sum_j q_j[r] . k_j[i] for RT rows and kBlock tokens.
template <typename Codes, int RT>
inline void integer_row_scores(float* s, const float* q, int64_t q_source, int64_t Dp, const BlockRows* k,
                               const int64_t* offsets, Ahead& ahead, int m, int64_t D) {
  const int64_t bytes = Codes::kHalves ? D / 2 : D, row = 2 * Dp, upper = Dp / 2;
  __m256 scale[RT];
  __m256i excess[RT];
  for (int r = 0; r < RT; ++r) {
    int32_t sum = 0;
    for (int j = 0; j < m; ++j) sum += row_facts(q + j * q_source + r * Dp, Dp).sum;
    scale[r] = _mm256_set1_ps(row_facts(q + r * Dp, Dp).scale);
    excess[r] = _mm256_set1_epi32(Codes::kHalves ? 8 * sum : 0);
  }
  for (int first = 0; first < kBlock; first += 8) {
    __m256i sums[RT][8];
    for (int i = 0; i < 8; ++i) {
      __m256i acc[RT];
      for (int r = 0; r < RT; ++r) acc[r] = _mm256_setzero_si256();
      for (int j = 0; j < m; ++j) {
        const char* key = (const char*)k[j].at<typename Codes::Element>(first + i, offsets[j]);
        const int16_t* qj = (const int16_t*)(q + j * q_source);
        ahead.bytes(bytes);
        if (first + i + kNear < kBlock) {
          const char* near = k[j].row[first + i + kNear] + offsets[j];
          for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(near + d, 0, 3);
        }
        int64_t d = 0;
#pragma GCC unroll 2
        for (; d + 16 <= bytes; d += 16)
          add_key_step<Codes, RT>(acc, qj + d, row, upper, _mm_loadu_si128((const __m128i*)(key + d)));
        if (d < bytes) add_key_step<Codes, RT>(acc, qj + d, row, upper, load_bytes(key + d, bytes - d));
      }
      for (int r = 0; r < RT; ++r) sums[r][i] = acc[r];
    }
    for (int r = 0; r < RT; ++r) {
      const __m256i sum = _mm256_sub_epi32(add_each(sums[r]), excess[r]);
      _mm256_storeu_ps(s + r * kBlock + first, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale[r]));
    }
  }
}

// NC steps of channels from byte d on, n bytes of the last one: 16 channels of int8, or 8 bytes of two codes.
// The two accumulators of a step are 8 channels each.
template <typename Codes, int RT, int NC>
inline void integer_channels(float* o, int64_t Dp, const IntegerProbabilities& p, int64_t row,
                             const BlockRows& v, int64_t offset, int64_t d, Ahead& ahead, int64_t n) {
  constexpr int kStep = Codes::kHalves ? 8 : 16;
  __m256i first[RT][NC], second[RT][NC];
  for (int r = 0; r < RT; ++r)
    for (int c = 0; c < NC; ++c) first[r][c] = second[r][c] = _mm256_setzero_si256();
  const int16_t* rounded = p.rounded[row];  // one address for all rows
  const int64_t at = offset + d;
#pragma GCC unroll 2
  for (int i = 0; i < kBlock; i += 2) {
    const char *even = v.row[i] + at, *odd = v.row[i + 1] + at;
    ahead.bytes(2 * NC * kStep);
    for (int c = 0; c < NC; ++c) {
      const int64_t bytes = c + 1 < NC ? kStep : n;
      const __m128i a = load_bytes(even + c * kStep, bytes), b = load_bytes(odd + c * kStep, bytes);
      __m256i x, y;
      if constexpr (Codes::kHalves) {
        const __m256i pairs = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
        x = _mm256_and_si256(pairs, _mm256_set1_epi16(15));
        y = _mm256_srli_epi16(pairs, 4);
      } else {
        x = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
        y = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
      }
      for (int r = 0; r < RT; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, rounded + r * kBlock + i, 4);
        const __m256i probabilities = _mm256_set1_epi32(pair);
        first[r][c] = add_products(first[r][c], probabilities, x);
        second[r][c] = add_products(second[r][c], probabilities, y);
      }
    }
  }
  for (int r = 0; r < RT; ++r) {
    const __m256 scale = _mm256_set1_ps(p.scale[row + r]);
    const __m256i excess = _mm256_set1_epi32(Codes::kHalves ? 8 * p.sum[row + r] : 0);
    const auto add_to = [&](float* to, __m256i sum) {
      const __m256 x = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, excess));
      _mm256_storeu_ps(to, _mm256_fmadd_ps(x, scale, _mm256_loadu_ps(to)));
    };
    for (int c = 0; c < NC; ++c) {
      float* to = o + r * Dp + d + c * kStep;
      add_to(to, first[r][c]);
      add_to(to + (Codes::kHalves ? Dp / 2 : 8), second[r][c]);
    }
  }
}

// o[r] += sum_i p[r][i] v[i] for RT rows.
template <typename Codes, int RT>
inline void integer_row_values(float* o, int64_t Dp, const IntegerProbabilities& p, int64_t row,
                               const BlockRows& v, int64_t offset, Ahead& ahead, int64_t D) {
  constexpr int NC = kChains<RT>, kStep = Codes::kHalves ? 8 : 16;
  const int64_t bytes = Codes::kHalves ? D / 2 : D;
  int64_t d = 0;
  for (; d + NC * kStep <= bytes; d += NC * kStep)
    integer_channels<Codes, RT, NC>(o, Dp, p, row, v, offset, d, ahead, kStep);
  for (; d < bytes; d += kStep)
    integer_channels<Codes, RT, 1>(o, Dp, p, row, v, offset, d, ahead, bytes - d < kStep ? bytes - d : kStep);
}

template <typename Codes>
void integer_scores(float* s, const float* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                    Ahead& ahead, int m, int64_t D, int64_t Dp) {
  for_row_tiles<8>(rows, [&](int64_t r, auto tile) {
    integer_row_scores<Codes, tile.rows>(s + r * kBlock, q + r * Dp, rows * Dp, Dp, k, offsets, ahead, m, D);
  });
}

template <typename Codes>
void integer_values(float* o, const IntegerProbabilities& p, int64_t rows, const BlockRows& v, int64_t offset,
                    Ahead& ahead, int64_t D, int64_t Dp) {
  for_row_tiles<4>(rows, [&](int64_t r, auto tile) {
    integer_row_values<Codes, tile.rows>(o + r * Dp, Dp, p, r, v, offset, ahead, D);
  });
}

#endif

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
