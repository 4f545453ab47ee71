// cache[pos] = new[s] with pos = len - S + s;    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)
//
// The rotation of pairs of channels of keys and queries is computed in fp32. Queries at pos < 0 are not
// rotated.
//
// A cache of codes gets u = (x - c) / s of the rotated key or of the value, in fp32, rounded to nearest even
// and saturated. NaN becomes the code of 0, or NaN where there is one.

#include "ops/append_kvcache/params.h"

#include "common/codes.h"
#include "common/limits.h"

#include "cpu/simd.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

namespace {

template <typename Out, typename T>
void rotate_into(Out* out, const T* x, const float* cos, const float* sin, int64_t rotary_dim,
                 bool interleaved) {
  const int64_t half = rotary_dim / 2;
  for (int64_t j = 0; j < half; ++j) {
    const int64_t i0 = interleaved ? 2 * j : j, i1 = interleaved ? 2 * j + 1 : j + half;
    const auto x0 = widen(x[i0]), x1 = widen(x[i1]);
    narrow(x0 * cos[j] - x1 * sin[j], out + i0);
    narrow(x1 * cos[j] + x0 * sin[j], out + i1);
  }
}

// Channels begin .. end - 1 of a row in fp32.
template <typename T>
void widen_into(float* out, const T* x, int64_t begin, int64_t end) {
  int64_t d = begin;
  if constexpr (sizeof(T) <= 4)
    for (; d + kLanes <= end; d += kLanes) store(out + d, load(x + d));
  for (; d < end; ++d) out[d] = float(widen(x[d]));
}

#if defined(__AVX2__)

// Eight codes at once.
template <CacheCode kCode>
inline __m256i encode8(__m256 u) {
  if (kCode == CacheCode::e4m3) {
    // |u| of [2^e, 2^(e+1)), or below 2^-6 with e = -6, is a multiple of 2^(e-3) after 2^(e+20) is added: a
    // float32 of that size has no smaller ones. The code counts these multiples, and 8 for each e above -6.
    const __m256i bits = _mm256_castps_si256(u), sign = _mm256_srli_epi32(bits, 24);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i held = _mm256_min_epu32(magnitude, _mm256_set1_epi32(0x43e00000));  // 448
    const __m256i power = _mm256_max_epi32(_mm256_and_si256(held, _mm256_set1_epi32(0x7f800000)),
                                           _mm256_set1_epi32(0x3c800000));  // 2^e
    const __m256i large = _mm256_add_epi32(power, _mm256_set1_epi32(20 << 23));
    const __m256 rounded = _mm256_add_ps(_mm256_castsi256_ps(held), _mm256_castsi256_ps(large));
    const __m256i multiples = _mm256_sub_epi32(_mm256_castps_si256(rounded), large);
    const __m256i steps = _mm256_srli_epi32(_mm256_sub_epi32(power, _mm256_set1_epi32(0x3c800000)), 20);
    const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
    // NaN was held at 448, code 0x7e.
    const __m256i code = _mm256_sub_epi32(_mm256_add_epi32(multiples, steps), is_nan);
    return _mm256_or_si256(code, _mm256_and_si256(sign, _mm256_set1_epi32(0x80)));
  }
  // NaN is the second operand, so that it stays; as an integer its low bits are 0.
  const bool wide = kCode == CacheCode::i8;
  u = _mm256_max_ps(_mm256_set1_ps(wide ? -127.f : -8.f), u);
  u = _mm256_min_ps(_mm256_set1_ps(wide ? 127.f : 7.f), u);
  const __m256i n = _mm256_cvtps_epi32(u);  // to nearest even
  return wide ? _mm256_and_si256(n, _mm256_set1_epi32(0xff))
              : _mm256_and_si256(_mm256_add_epi32(n, _mm256_set1_epi32(8)), _mm256_set1_epi32(15));
}

inline __m256 widen8(const float* x) {
  return _mm256_loadu_ps(x);
}
inline __m256 widen8(const bf16* x) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
inline __m256 widen8(const f16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}

inline void store_codes(uint8_t* to, __m256i codes) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}

// 4 x 8 codes. Packing works on each half of a register: the last step puts groups of four in order.
inline void store_codes(uint8_t* to, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(bytes, order));
}

#endif

// The codes of one head, of u = (x - center) / scale.
template <CacheCode kCode, typename T>
void encode_row(const T* x, const float* scale, const float* center, int64_t D, uint8_t* to) {
  constexpr bool kHalves = kCode == CacheCode::i4;
  const int64_t bytes = kHalves ? D / 2 : D;
  int64_t d = 0;
#if defined(__AVX2__)
  const auto at = [&](int64_t i) {
    __m256 u = widen8(x + i);
    if (center) u = _mm256_sub_ps(u, _mm256_loadu_ps(center + i));
    return encode8<kCode>(_mm256_div_ps(u, _mm256_loadu_ps(scale + i)));
  };
  const auto byte = [&](int64_t i) {
    return kHalves ? _mm256_or_si256(at(i), _mm256_slli_epi32(at(bytes + i), 4)) : at(i);
  };
  for (; d + 32 <= bytes; d += 32) store_codes(to + d, byte(d), byte(d + 8), byte(d + 16), byte(d + 24));
  for (; d + 8 <= bytes; d += 8) store_codes(to + d, byte(d));
#endif
  const auto one = [&](int64_t i) {
    const float u = widen(x[i]);
    return encode<kCode>((center ? u - center[i] : u) / scale[i]);
  };
  for (; d < bytes; ++d) to[d] = uint8_t(kHalves ? one(d) | one(bytes + d) << 4 : one(d));
}

template <typename T>
void encode_row(CacheCode code, const T* x, const float* scale, const float* center, int64_t D, void* out) {
  uint8_t* to = (uint8_t*)out;
  if (code == CacheCode::i8) return encode_row<CacheCode::i8>(x, scale, center, D, to);
  if (code == CacheCode::i4) return encode_row<CacheCode::i4>(x, scale, center, D, to);
  encode_row<CacheCode::e4m3>(x, scale, center, D, to);
}

// Copies all heads of token s of sequence b to row `row`, slot `slot`. Rotates the first `rotated` channels
// by table row `pos`.
template <typename T>
void move_token(const AppendKVCacheParams& p, const AppendTensor& x, int64_t b, int64_t s, int64_t row,
                int64_t slot, int64_t pos, int64_t rotated) {
  const int64_t size = size_of(x.code, p.dtype), bytes = copied_bytes(x, p.dtype);
  for (int64_t g = 0; x.code != CacheCode::raw && g < x.heads; ++g) {
    const int64_t from = b * x.src_stride_b + s * x.src_stride_s + g * x.src_stride_g;
    char* to = (char*)x.dst + (row * x.dst_stride_b + slot * x.dst_stride_t + g * x.dst_stride_g) * size;
    if (!x.scale) {
      __builtin_memcpy(to, (const char*)x.src + from * size, size_t(bytes));
      continue;
    }
    const T* channels = (const T*)x.src + from;
    const float *scale = x.scale + g * x.D, *center = x.center ? x.center + g * x.D : nullptr;
    if constexpr (sizeof(T) <= 4) {
      if (!rotated) {
        encode_row(x.code, channels, scale, center, x.D, to);
        continue;
      }
    }
    alignas(64) float wide[kMaxHeadDim];
    if (rotated) {
      const int64_t angles = pos * (rotated / 2);
      rotate_into(wide, channels, p.cos + angles, p.sin + angles, rotated, p.interleaved);
    }
    widen_into(wide, channels, rotated, x.D);
    encode_row(x.code, wide, scale, center, x.D, to);
  }
  for (int64_t g = 0; x.code == CacheCode::raw && g < x.heads; ++g) {
    const T* from = (const T*)x.src + b * x.src_stride_b + s * x.src_stride_s + g * x.src_stride_g;
    T* to = (T*)x.dst + row * x.dst_stride_b + slot * x.dst_stride_t + g * x.dst_stride_g;
    if (rotated)
      rotate_into(to, from, p.cos + pos * rotated / 2, p.sin + pos * rotated / 2, rotated, p.interleaved);
    __builtin_memcpy(to + rotated, from + rotated, size_t(x.D - rotated) * sizeof(T));
  }
}

template <typename T>
void append(const AppendKVCacheParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.S, s = token % p.S;
    const int64_t pos = p.seq_lens[b] - p.S + s;
    const int64_t rotated = p.cos && pos >= 0 ? p.rotary_dim : 0;
    move_token<T>(p, p.query, b, s, b, s, pos, rotated);
    if (pos < 0) continue;
    const int64_t row = p.block_table ? p.block_table[b * p.block_table_stride + pos / p.page_size] : b;
    const int64_t slot = p.block_table ? pos % p.page_size : pos;
    move_token<T>(p, p.key, b, s, row, slot, pos, rotated);
    move_token<T>(p, p.value, b, s, row, slot, pos, 0);
  }
}

}  // namespace

void append_kvcache(const AppendKVCacheParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) { append<typename decltype(tag)::type>(p, begin, end); });
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
