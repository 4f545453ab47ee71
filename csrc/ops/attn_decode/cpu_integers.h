// The two products over int8 and 4-bit codes in integers, for 16-bit queries: AVX2, also in the AVX-512
// targets.
//
// Nothing crosses lanes: a word of two bytes is split by masks and shifts, never by vpmovsx. So channels are
// in another order. A query row is stored in the order of the key's words; an output row is ordered at the
// end of a task.
//
// Keys: a query row is rounded to 16 bits with one scale for all of its sources. vpmaddwd multiplies it with
// codes plus an offset that makes them positive, and adds pairs. Sums are exact in 32 bits.
//
// Values: the probabilities of a block are rounded so that they sum up to less than 2^15. Codes are in the
// high bits of 16. vpmulhrsw multiplies and keeps the high half. So sums over the block fit 16 bits, and the
// rounding of a product is at most 1/512 of a step of int8, 1/8192 of a 4-bit one.
#pragma once

#include "ops/attn_decode/cpu_products.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// Probabilities of a block, or of a source if its tokens have factors.
struct IntegerProbabilities {
  alignas(64) int32_t rounded[kMaxTaskRows][kBlock];  // twice in 16 bits
  float scale[kMaxTaskRows];                          // rounded * scale is the probability
  bool finite;
};

#if defined(__AVX2__)

constexpr int kIntegerPad = 32;      // channels of a load, or twice as many
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

// Rounds a row of m sources in place, `stride` floats apart, and puts the even channels of each 32 before the
// odd ones. The products with codes up to 255 of all sources fit 32 bits. A row that is not finite has the
// scale NaN, and so NaN scores.
inline void round_query(float* row, int m, int64_t stride, int64_t Dp) {
  __m256i highest = _mm256_setzero_si256();
  for (int j = 0; j < m; ++j)
    for (int64_t d = 0; d < Dp; d += 8) highest = _mm256_max_epi32(highest, abs_bits(row + j * stride + d));
  const uint32_t bits = highest_bits(highest);
  const float largest = float_of(bits);
  const int64_t fitting = INT32_MAX / (m * Dp * 255), limit = fitting < INT16_MAX ? fitting : INT16_MAX;
  const bool finite = bits < kInfinityBits, zero = largest < kSmallest;
  const __m256 factor = _mm256_set1_ps(!finite || zero ? 0.f : float(limit) / largest);
  const float scale = !finite ? float_of(0x7fc00000u) : zero ? 0.f : largest / float(limit);
  const __m256i low = _mm256_set1_epi32(0xffff), none = _mm256_setzero_si256();
  for (int j = 0; j < m; ++j) {
    float* x = row + j * stride;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t d = 0; d < Dp; d += 32) {
      const __m256i a = finite ? round16(x + d, factor) : none;
      const __m256i b = finite ? round16(x + d + 16, factor) : none;
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, _mm256_set1_epi16(1)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(b, _mm256_set1_epi16(1)));
      const __m256i even = _mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
      const __m256i odd = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
      _mm256_storeu_si256((__m256i*)((int16_t*)x + d), _mm256_permute4x64_epi64(even, 0xd8));
      _mm256_storeu_si256((__m256i*)((int16_t*)x + d + 16), _mm256_permute4x64_epi64(odd, 0xd8));
    }
    alignas(32) int32_t parts[8];
    _mm256_store_si256((__m256i*)parts, sum);
    int32_t total = 0;
    for (int i = 0; i < 8; ++i) total += parts[i];
    *row_facts(x, Dp) = {scale, total};
  }
}

// Rounding kBlock probabilities, and then their products with words of 2^15, adds up to kBlock / 2 each time.
// The sum of the products still fits 16 bits.
constexpr float kSumOfProbabilities = float(INT16_MAX - kBlock);

inline void round_probabilities(const float* p, int64_t rows, IntegerProbabilities* to) {
  to->finite = true;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = p + r * kBlock;
    __m256 sums = _mm256_setzero_ps();
    for (int i = 0; i < kBlock; i += 8)
      sums = _mm256_add_ps(sums, _mm256_and_ps(_mm256_loadu_ps(x + i), magnitude));
    __m128 total = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    total = _mm_add_ps(total, _mm_movehl_ps(total, total));
    const float sum = _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total)));
    if (!(sum < float_of(kInfinityBits))) {
      to->finite = false;
      return;
    }
    const bool zero = sum < kSmallest;
    const __m256 factor = _mm256_set1_ps(zero ? 0.f : kSumOfProbabilities / sum);
    for (int i = 0; i < kBlock; i += 8) {
      const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
      const __m256i twice = _mm256_blend_epi16(rounded, _mm256_slli_epi32(rounded, 16), 0xaa);
      _mm256_store_si256((__m256i*)(to->rounded[r] + i), twice);
    }
    to->scale[r] = zero ? 0.f : sum / kSumOfProbabilities;
  }
}

// The first n of 32 bytes, the others zero.
inline __m256i load_bytes(const void* from, int64_t n) {
  if (n >= 32) return _mm256_loadu_si256((const __m256i*)from);
  alignas(32) uint8_t bytes[32] = {};
  __builtin_memcpy(bytes, from, size_t(n));
  return _mm256_load_si256((const __m256i*)bytes);
}

// Lane i is the sum of the lanes of x[i].
inline __m256i add_each(const __m256i* x) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// In assembly, because gcc 12 adds into another register and copies it back, in every step of the loops. For
// the same reason they are not unrolled: it would load too early and spill.
inline __m256i add_products(__m256i sum, __m256i x, __m256i y) {
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(x, y)));
  return sum;
}

inline __m256i add_high_products(__m256i sum, __m256i x, __m256i y) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_mulhrs_epi16(x, y)));
  return sum;
}

inline __m256i load16(const int16_t* x) {
  return _mm256_loadu_si256((const __m256i*)x);
}

constexpr int kNear = 8;  // tokens from a key to that which it fetches into L1

// Tokens that the loops take at once. More would not fit the registers.
template <int RT>
constexpr int kKeyTokens = RT >= 4 ? 1 : 4 / RT;
constexpr int kValueTokens = 4;

// How 32 bytes of codes become words of their even and of their odd bytes. A byte of 4-bit codes has a
// channel of each half: kHalves is 2. Words of keys are codes plus kOffset, at least 0. fn gets their half
// and their place in a query of 32 channels. Words of values are codes times 2^15 / kRange, of one half.
struct Int8Codes {
  using Element = int8_t;
  static constexpr int kHalves = 1, kOffset = 128, kRange = 128;

  template <typename Fn>
  static void for_key_words(__m256i bytes, const Fn& fn) {
    const __m256i x = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    fn(0, 0, _mm256_and_si256(x, _mm256_set1_epi16(255)));
    fn(0, 16, _mm256_srli_epi16(x, 8));
  }

  template <int kHalf>
  static void value_words(__m256i bytes, __m256i* even, __m256i* odd) {
    *even = _mm256_slli_epi16(bytes, 8);
    *odd = _mm256_and_si256(bytes, _mm256_set1_epi16(int16_t(0xff00)));
  }
};

struct NibbleCodes {
  using Element = nibbles;
  static constexpr int kHalves = 2, kOffset = 8, kRange = 8;

  template <typename Fn>
  static void for_key_words(__m256i bytes, const Fn& fn) {
    const __m256i low = _mm256_set1_epi16(15);
    fn(0, 0, _mm256_and_si256(bytes, low));
    fn(1, 0, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
    fn(0, 16, _mm256_and_si256(_mm256_srli_epi16(bytes, 8), low));
    fn(1, 16, _mm256_srli_epi16(bytes, 12));
  }

  template <int kHalf>
  static void value_words(__m256i bytes, __m256i* even, __m256i* odd) {
    const __m256i x = _mm256_xor_si256(bytes, _mm256_set1_epi8(int8_t(0x88)));
    const __m256i high = _mm256_set1_epi16(int16_t(0xf000));
    *even = kHalf ? _mm256_and_si256(_mm256_slli_epi16(x, 8), high) : _mm256_slli_epi16(x, 12);
    *odd = _mm256_and_si256(kHalf ? x : _mm256_slli_epi16(x, 4), high);
  }
};

// s[r][i] = sum_j q_j[r] . k_j[i] for RT rows and kBlock tokens.
template <typename Codes, int RT>
inline void integer_row_scores(float* s, const float* q, int64_t q_source, int64_t Dp, const BlockRows* k,
                               const int64_t* offsets, Ahead& ahead, int m, int64_t D) {
  const int64_t bytes = D / Codes::kHalves, row = 2 * Dp, upper = Dp / 2;
  __m256 scale[RT];
  __m256i excess[RT];
  for (int r = 0; r < RT; ++r) {
    int32_t sum = 0;
    for (int j = 0; j < m; ++j) sum += row_facts(q + j * q_source + r * Dp, Dp).sum;
    scale[r] = _mm256_set1_ps(row_facts(q + r * Dp, Dp).scale);
    excess[r] = _mm256_set1_epi32(Codes::kOffset * sum);
  }
  constexpr int kTokens = kKeyTokens<RT>;
  for (int first = 0; first < kBlock; first += 8) {
    __m256i sums[RT][8];
    for (int i = 0; i < 8; i += kTokens) {
      __m256i acc[kTokens][RT];
      for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < RT; ++r) acc[t][r] = _mm256_setzero_si256();
      for (int j = 0; j < m; ++j) {
        const char* const* key = k[j].row + first + i;
        const int64_t offset = offsets[j];
        const int16_t* qj = (const int16_t*)(q + j * q_source);
        ahead.bytes(kTokens * bytes);
        for (int t = 0; first + i + kNear < kBlock && t < kTokens; ++t) {
          const char* near = key[t + kNear] + offset;
          for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(near + d, 0, 3);
        }
        const auto step = [&](int64_t d, int64_t n) {
          for (int t = 0; t < kTokens; ++t) {
            Codes::for_key_words(load_bytes(key[t] + offset + d, n), [&](int half, int word, __m256i x) {
              const int16_t* to = qj + half * upper + d + word;
              for (int r = 0; r < RT; ++r) acc[t][r] = add_products(acc[t][r], load16(to + r * row), x);
            });
          }
        };
        int64_t d = 0;
#pragma GCC unroll 1
        for (; d + 32 <= bytes; d += 32) step(d, 32);
        if (d < bytes) step(d, bytes - d);
      }
      for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < RT; ++r) sums[r][i + t] = acc[t][r];
    }
    for (int r = 0; r < RT; ++r) {
      const __m256i sum = _mm256_sub_epi32(add_each(sums[r]), excess[r]);
      _mm256_storeu_ps(s + r * kBlock + first, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale[r]));
    }
  }
}

// NC steps of 32 bytes from byte d on, n bytes of the last one. o: of this half of the codes.
template <typename Codes, int kHalf, int RT, int NC, bool kWhole>
inline void integer_channels(float* o, int64_t Dp, const IntegerProbabilities& p, int64_t row,
                             const BlockRows& v, int64_t offset, int64_t d, Ahead& ahead, int64_t n) {
  __m256i even[RT][NC], odd[RT][NC];
  for (int r = 0; r < RT; ++r)
    for (int c = 0; c < NC; ++c) even[r][c] = odd[r][c] = _mm256_setzero_si256();
  const int32_t* rounded = p.rounded[row];  // one address for all rows
  const int64_t at = offset + d;
  for (int first = 0; first < kBlock; first += kValueTokens) {
    ahead.bytes(kValueTokens * NC * 32);
#pragma GCC unroll 1
    for (int i = first; i < first + kValueTokens; ++i) {
      const char* from = v.row[i] + at;
      for (int c = 0; c < NC; ++c) {
        __m256i x, y;
        Codes::template value_words<kHalf>(load_bytes(from + 32 * c, kWhole ? 32 : n), &x, &y);
        for (int r = 0; r < RT; ++r) {
          const __m256i probability = _mm256_set1_epi32(rounded[r * kBlock + i]);
          even[r][c] = add_high_products(even[r][c], probability, x);
          odd[r][c] = add_high_products(odd[r][c], probability, y);
        }
      }
    }
  }
  for (int r = 0; r < RT; ++r) {
    const __m256 scale = _mm256_set1_ps(p.scale[row + r] * (float(Codes::kRange) / 65536.f));
    const auto add_to = [&](float* to, __m256i sum) {
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(to)));
    };
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    for (int c = 0; c < NC; ++c) {
      float* to = o + r * Dp + d + c * 32;
      add_to(to, _mm256_slli_epi32(even[r][c], 16));
      add_to(to + 8, _mm256_slli_epi32(odd[r][c], 16));
      add_to(to + 16, _mm256_and_si256(even[r][c], high));
      add_to(to + 24, _mm256_and_si256(odd[r][c], high));
    }
  }
}

// o[r] += sum_i p[r][i] v[i] for RT rows and the channels of a half, or all.
template <typename Codes, int kHalf, int RT>
inline void integer_row_values(float* o, int64_t Dp, const IntegerProbabilities& p, int64_t row,
                               const BlockRows& v, int64_t offset, Ahead& ahead, int64_t D) {
  constexpr int NC = kChains<RT>;
  const int64_t bytes = D / Codes::kHalves;
  float* half = o + kHalf * Dp / 2;
  int64_t d = 0;
  for (; d + NC * 32 <= bytes; d += NC * 32)
    integer_channels<Codes, kHalf, RT, NC, true>(half, Dp, p, row, v, offset, d, ahead, 32);
  for (; d + 32 <= bytes; d += 32)
    integer_channels<Codes, kHalf, RT, 1, true>(half, Dp, p, row, v, offset, d, ahead, 32);
  if (d < bytes)
    integer_channels<Codes, kHalf, RT, 1, false>(half, Dp, p, row, v, offset, d, ahead, bytes - d);
}

// integer_channels puts the channels of 32 bytes of codes in the order 0, 4, .. 28, 1, 5, .. 29, 2, .. 31.
inline void order_integer_channels(float* to, const float* from, int64_t padded) {
  for (int64_t d = 0; d < padded; d += 32)
    for (int i = 0; i < 8; ++i)
      for (int c = 0; c < 4; ++c) to[d + 4 * i + c] = from[d + 8 * c + i];
}

inline void unorder_integer_channels(float* to, const float* from, int64_t padded) {
  for (int64_t d = 0; d < padded; d += 32)
    for (int c = 0; c < 4; ++c)
      for (int i = 0; i < 8; ++i) to[d + 8 * c + i] = from[d + 4 * i + c];
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
  Ahead none;
  for_row_tiles<4>(rows, [&](int64_t r, auto tile) {
    integer_row_values<Codes, 0, tile.rows>(o + r * Dp, Dp, p, r, v, offset, r == 0 ? ahead : none, D);
    if constexpr (Codes::kHalves == 2)
      integer_row_values<Codes, 1, tile.rows>(o + r * Dp, Dp, p, r, v, offset, none, D);
  });
}

#endif

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
