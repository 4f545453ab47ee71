// A float vector of the widest width that this translation unit is compiled for.
//
// Every *_cpu.cpp is compiled once per SIMD level (CMakeLists.txt) into a namespace of that level's name;
// cpu_kernels.cpp picks one at run time. Hence the rule of this header and of its users: no inline function
// of the standard library and nothing outside the level's namespace that is compiled with the level's flags,
// or the linker could keep an AVX-512 copy for everybody.
//
// Only what the kernels use is here: loads that widen to fp32, stores that round once (to nearest even), fma,
// max, exp2, and the sum of each of kLanes vectors at once.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#ifndef FUSEDKV_LEVEL
#define FUSEDKV_LEVEL portable
#endif

namespace fusedkv {
namespace FUSEDKV_LEVEL {

// ---- scalars
// ------------------------------------------------------------------------------------------------------

static inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static inline float widen(float x) {
  return x;
}
static inline double widen(double x) {
  return x;
}
static inline float widen(bf16 x) {
  return float_of(uint32_t(x.bits) << 16);
}

static inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f;
  const uint32_t mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000u | (mantissa << 13));
  // Zero and subnormals: mantissa * 2^-24 is exact in fp32.
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 5.9604644775390625e-8f));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

static inline void narrow(float x, float* out) {
  *out = x;
}
static inline void narrow(double x, double* out) {
  *out = x;
}

static inline void narrow(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  // Rounding could carry a NaN's mantissa into infinity: keep it a quiet NaN.
  out->bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40)
                                              : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline void narrow(float x, f16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const uint32_t u = bits_of(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lines the mantissa up with units of 2^-24
    out->bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    out->bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13));
  }
#endif
}

// exp2(f) = 1 + f * (C1 + f * (C2 + ...)) on [-0.5, 0.5]: minimax fit, relative error 2e-9, 1e-7 once
// evaluated in fp32.
constexpr float kExp2C1 = 0.693147182f, kExp2C2 = 0.240226477f, kExp2C3 = 0.0555033237f,
                kExp2C4 = 0.00961843692f, kExp2C5 = 0.0013398875f, kExp2C6 = 0.00015353362f;

// ---- vectors
// ------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

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

// Integer rounding rather than vcvtneps2bf16: that one flushes subnormals, and this one gives the same bits
// on every level.
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

#elif defined(__AVX2__)

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
static inline Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
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
static inline void store(f16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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

#else  // portable: fixed-size loops that any compiler turns into its baseline vectors

constexpr int kLanes = 8;

struct Vec {
  float v[8];
};

template <typename Fn>
static inline Vec map(const Fn& fn) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = fn(i);
  return r;
}

static inline Vec zero() {
  return map([](int) { return 0.f; });
}
static inline Vec set1(float x) {
  return map([=](int) { return x; });
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline Vec add(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
static inline Vec sub(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
static inline Vec mul(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
static inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <typename T>
static inline Vec load(const T* p) {
  return map([=](int i) { return widen(p[i]); });
}
template <typename T>
static inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) narrow(x.v[i], p + i);
}
static inline float reduce_add(Vec x) {
  return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
}
static inline float reduce_max(Vec x) {
  float m = x.v[0];
  for (int i = 1; i < kLanes; ++i) m = m > x.v[i] ? m : x.v[i];
  return m;
}
static inline Vec reduce_add_each(const Vec* x) {
  return map([=](int i) { return reduce_add(x[i]); });
}
static inline Vec exp2(Vec x) {
  return map([&](int i) { return __builtin_exp2f(x.v[i]); });
}

#endif

#if !defined(__AVX512F__)
// D is a multiple of 8 and so are 8 lanes: a part load only happens with 16 lanes. These keep the kernels one
// source.
template <typename T>
static inline Vec load(const T* p, int) {
  return load(p);
}
template <typename T>
static inline void store(T* p, Vec x, int) {
  store(p, x);
}
#endif

}  // namespace FUSEDKV_LEVEL
}  // namespace fusedkv
