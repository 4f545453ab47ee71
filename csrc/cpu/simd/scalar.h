// One element at a time: widening to the type of sums, narrowing with one rounding to nearest even.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

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

static inline float widen(int8_t x) {
  return float(x);
}
static inline float widen(e4m3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80u) << 24, exponent = (x.bits >> 3) & 0xf, mantissa = x.bits & 7;
  if ((x.bits & 0x7f) == 0x7f) return float_of(0x7fc00000u | sign);
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 0.001953125f));  // units of 2^-9
  return float_of(sign | ((exponent + 120) << 23) | (mantissa << 20));
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

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
