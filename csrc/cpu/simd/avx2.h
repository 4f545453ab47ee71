// 8 floats. See cpu/simd.h, which includes this where the target has AVX2 and no AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};

static inline Vec zero() {
  return {_mm256_setzero_ps()};
}
static inline Vec set1(float x) {
  return {_mm256_set1_ps(x)};
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline Vec add(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
static inline Vec sub(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
static inline Vec mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
static inline Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}

static inline Vec widen16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
static inline Vec load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
static inline Vec load(const bf16* p) {
  return widen16(_mm_loadu_si128((const __m128i*)p));
}
// 16 channels: those at even and those at odd places. Of the second form the first n, 8 or 16, are read.
static inline void load_words(const bf16* p, Vec* even, Vec* odd) {
  const __m256i words = _mm256_loadu_si256((const __m256i*)p);
  *even = {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  *odd = {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int32_t(0xffff0000))))};
}
static inline void load_words(const bf16* p, int n, Vec* even, Vec* odd) {
  alignas(32) bf16 part[16] = {};
  memcpy(part, p, size_t(n) * sizeof(bf16));
  load_words(part, even, odd);
}
static inline Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
static inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
// As fp16, e4m3 is 2^-8 times its number: shifted mantissa and exponent, but for NaN.
static inline Vec load(const e4m3* p) {
  const __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  const __m128i magnitude = _mm_set1_epi16(0x7f);
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(x, magnitude), magnitude);
  const __m128i h = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(int16_t(0xbfff)));
  const __m128i half = _mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7c00)));
  return {_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.f))};
}

// The numbers of the 4-bit codes, and those of kLanes pairs of codes, of which the first n (4 or 8) are read.
struct Table {
  __m256 first, last;
};
static inline Table load_table(const float* numbers) {
  return {_mm256_loadu_ps(numbers), _mm256_loadu_ps(numbers + 8)};
}
// Only the low 4 bits of each index count.
static inline Vec look_up(Table table, __m256i index) {
  const __m256 first = _mm256_permutevar8x32_ps(table.first, index),
               last = _mm256_permutevar8x32_ps(table.last, index);
  return {_mm256_blendv_ps(first, last, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
}
static inline void load_pairs(const nibbles* p, int n, Table table, Vec* low, Vec* high) {
  int32_t four = 0;
  if (n < 8) memcpy(&four, p, 4);
  const __m128i bytes = n < 8 ? _mm_cvtsi32_si128(four) : _mm_loadl_epi64((const __m128i*)p);
  const __m256i index = _mm256_cvtepu8_epi32(bytes);
  *low = look_up(table, index);
  *high = look_up(table, _mm256_srli_epi32(index, 4));
}

static inline __m128i round_bf16(Vec x) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
static inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.v);
}
static inline void store(bf16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, round_bf16(x));
}
static inline __m128i round_f16(Vec x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline void store(f16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, round_f16(x));
}

// Past the caches; p aligned to what is written. What was streamed is ordered by stream_fence.
static inline void stream(float* p, Vec x) {
  _mm256_stream_ps(p, x.v);
}
static inline void stream(bf16* p, Vec x) {
  _mm_stream_si128((__m128i*)p, round_bf16(x));
}
static inline void stream(f16* p, Vec x) {
  _mm_stream_si128((__m128i*)p, round_f16(x));
}
static inline void stream_fence() {
  _mm_sfence();
}

static inline float reduce_add(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float reduce_max(Vec x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline Vec reduce_add_each(const Vec* x) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

static inline Vec exp2(Vec x) {
  const __m256 low = _mm256_max_ps(_mm256_set1_ps(-127.f), _mm256_min_ps(_mm256_set1_ps(128.f), x.v));
  const __m256 n = _mm256_round_ps(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(low, n);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(kExp2C6), f, _mm256_set1_ps(kExp2C5));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C4));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C3));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C1));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.f));
  // Exponent -127 gives a zero scale: everything below 2^-126.5 is flushed to 0. A NaN x stays NaN through p.
  const __m256i scale =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 r = _mm256_mul_ps(p, _mm256_castsi256_ps(scale));
  return {_mm256_blendv_ps(r, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
