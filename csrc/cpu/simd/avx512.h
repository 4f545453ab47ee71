// 16 floats. See cpu/simd.h, which includes this where the target has AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};

static inline Vec zero() {
  return {_mm512_setzero_ps()};
}
static inline Vec set1(float x) {
  return {_mm512_set1_ps(x)};
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
static inline Vec add(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline Vec sub(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline Vec mul(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
static inline Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}

static inline __mmask16 lanes(int n) {
  return __mmask16((1u << n) - 1u);
}

static inline Vec load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
static inline Vec load(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(lanes(n), p)};
}
static inline Vec widen16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline Vec load(const bf16* p) {
  return widen16(_mm256_loadu_si256((const __m256i*)p));
}
static inline Vec load(const bf16* p, int n) {
  return widen16(_mm256_maskz_loadu_epi16(lanes(n), p));
}
static inline Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
static inline Vec load(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))};
}
static inline Vec widen8(__m128i codes) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))};
}
static inline Vec load(const int8_t* p) {
  return widen8(_mm_loadu_si128((const __m128i*)p));
}
static inline Vec load(const int8_t* p, int n) {
  return widen8(_mm_maskz_loadu_epi8(lanes(n), p));
}
// As fp16, e4m3 is 2^-8 times its number: shifted mantissa and exponent, but for NaN.
static inline Vec widen_e4m3(__m128i codes) {
  const __m256i x = _mm256_cvtepi8_epi16(codes), magnitude = _mm256_set1_epi16(0x7f);
  const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(x, magnitude), magnitude);
  const __m256i h = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(int16_t(0xbfff)));
  const __m256i half = _mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi16(0x7c00)));
  return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.f))};
}
static inline Vec load(const e4m3* p) {
  return widen_e4m3(_mm_loadu_si128((const __m128i*)p));
}
static inline Vec load(const e4m3* p, int n) {
  return widen_e4m3(_mm_maskz_loadu_epi8(lanes(n), p));
}

// The numbers of the 4-bit codes, and those of kLanes pairs of codes, of which the first n are read.
struct Table {
  __m512 numbers;
};
static inline Table load_table(const float* numbers) {
  return {_mm512_loadu_ps(numbers)};
}
static inline void load_pairs(const nibbles* p, int n, Table table, Vec* low, Vec* high) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p));
  *low = {_mm512_permutexvar_ps(index, table.numbers)};  // the low 4 bits of each index count
  *high = {_mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table.numbers)};
}

// Integer rounding rather than vcvtneps2bf16: that one flushes subnormals, and this one gives the same bits
// on every SIMD target.
static inline __m256i round_bf16(Vec x) {
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
static inline __m256i round_f16(Vec x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline void store(float* p, Vec x) {
  _mm512_storeu_ps(p, x.v);
}
static inline void store(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, lanes(n), x.v);
}
static inline void store(bf16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, round_bf16(x));
}
static inline void store(bf16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), round_bf16(x));
}
static inline void store(f16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, round_f16(x));
}
static inline void store(f16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), round_f16(x));
}

// Past the caches; p aligned to what is written. What was streamed is ordered by stream_fence.
static inline void stream(float* p, Vec x) {
  _mm512_stream_ps(p, x.v);
}
static inline void stream(bf16* p, Vec x) {
  _mm256_stream_si256((__m256i*)p, round_bf16(x));
}
static inline void stream(f16* p, Vec x) {
  _mm256_stream_si256((__m256i*)p, round_f16(x));
}
static inline void stream_fence() {
  _mm_sfence();
}

static inline float reduce_add(Vec x) {
  return _mm512_reduce_add_ps(x.v);
}
static inline float reduce_max(Vec x) {
  return _mm512_reduce_max_ps(x.v);
}

// Lane i of the result is the sum of the lanes of x[i]: a transpose that adds on the way, 15 adds for 16
// sums.
static inline Vec reduce_add_each(const Vec* x) {
  __m512 a[8], b[4];
  for (int i = 0; i < 8; ++i)  // lanes of a 128-bit quarter: [i, i+8, i, i+8] halves folded once
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[i].v, x[i + 8].v), _mm512_unpackhi_ps(x[i].v, x[i + 8].v));
  for (int i = 0; i < 4; ++i) {  // quarter: [i, i+8, i+4, i+12]
    const __m512d p = _mm512_castps_pd(a[i]), q = _mm512_castps_pd(a[i + 4]);
    b[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  // Quarters still hold partial sums of the same four rows: fold 4 quarters of 4 vectors into one vector of 4
  // quarters.
  const __m512 c0 =
      _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 c1 =
      _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(c0, c1, 0x88), _mm512_shuffle_f32x4(c0, c1, 0xdd));
  // d's quarter k holds rows [k, k+8, k+4, k+12].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(order, d)};
}

static inline Vec exp2(Vec x) {
  const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // x - n is NaN for x = -inf; the result must be 0, so clamp first (maxps returns its second operand for a
  // NaN x).
  const __m512 low = _mm512_max_ps(_mm512_set1_ps(-200.f), x.v);
  const __m512 m = _mm512_max_ps(_mm512_set1_ps(-200.f), n);
  const __m512 f = _mm512_sub_ps(low, m);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(kExp2C6), f, _mm512_set1_ps(kExp2C5));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C4));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C3));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C2));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C1));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return {_mm512_scalef_ps(p, m)};
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
