// The two products of cached attention on the CPU where keys or values are codes, or have a factor per token.
//
// A static code x = c + s (.) u per channel needs no decoding. The caller multiplies s into the fusion
// weights and adds c to the output (value_bias); q . c drops out of the softmax. So these kernels multiply
// the codes u themselves, widened in registers.
//
// Keys and values choose their kernels independently: one function for each, behind a pointer that is called
// once per block of tokens and KV head. 16-bit queries use integer products where there are any
// (cpu_integers.h), all else is widened to fp32.
#pragma once

#include "ops/attn_decode/cpu_integers.h"
#include "ops/attn_decode/cpu_products.h"
#include "ops/attn_decode/params.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// What the kernels of one KV head need beside its rows.
struct CodeContext {
  const float* numbers;  // of the 4-bit codes, kCodebook of them
  const IntegerProbabilities* probabilities;
};

// The products of one side. The head dim of the scratch is a multiple of `pad`. With `halves` it is two
// parts, each padded: the channels of the low and those of the high halves of bytes.
struct KeyKernel {
  void (*scores)(float* s, const float* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                 Ahead& ahead, int m, int64_t D, int64_t Dp, const CodeContext& context);
  int pad;
  bool halves;
  bool integers = false;  // of queries that round_query has rounded
};

struct ValueKernel {
  void (*values)(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset, Ahead& ahead,
                 int64_t D, int64_t Dp, const CodeContext& context);
  int pad;
  bool halves;
  bool integers = false;  // of the context's probabilities
};

inline int64_t padded_dim(int64_t D, int pad, bool halves) {
  const int64_t part = halves ? D / 2 : D, padded = (part + pad - 1) / pad * pad;
  return halves ? 2 * padded : padded;
}

// ---- fp32: every element type -------------------------------------------------------------------

template <typename T>
void wide_scores(float* s, const float* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                 Ahead& ahead, int m, int64_t D, int64_t Dp, const CodeContext&) {
  Fp32Products<T>::scores(s, q, rows, k, offsets, ahead, m, D, Dp);
}

template <typename T>
void wide_values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset, Ahead& ahead,
                 int64_t D, int64_t Dp, const CodeContext&) {
  Fp32Products<T>::values(o, p, rows, v, offset, ahead, D, Dp);
}

// s[r][i] = sum_j q_j[r] . k_j[i] for RT rows and kBlock tokens of 4-bit codes.
template <int RT>
inline void nibble_scores(float* s, const float* q, int64_t q_source, int64_t Dp, const BlockRows* k,
                          const int64_t* offsets, Ahead& ahead, int m, int64_t D, Table table) {
  const int64_t half = D / 2, upper = Dp / 2;
  for (int first = 0; first < kBlock; first += kLanes) {
    Vec sums[RT][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      Vec acc[RT];
      for (int r = 0; r < RT; ++r) acc[r] = zero();
      for (int j = 0; j < m; ++j) {
        const nibbles* key = k[j].at<nibbles>(first + i, offsets[j]);
        const float* qj = q + j * q_source;
        ahead.bytes(half);
        for_lanes(half, [&](int64_t d, int n) {
          Vec low, high;
          load_pairs(key + d, n, table, &low, &high);
          for (int r = 0; r < RT; ++r) {
            acc[r] = fma(load(qj + r * Dp + d), low, acc[r]);
            acc[r] = fma(load(qj + r * Dp + upper + d), high, acc[r]);
          }
        });
      }
      for (int r = 0; r < RT; ++r) sums[r][i] = acc[r];
    }
    for (int r = 0; r < RT; ++r) store(s + r * kBlock + first, reduce_add_each(sums[r]));
  }
}

// o[r] += sum_i p[r][i] v[i] for RT rows of 4-bit codes.
template <int RT>
inline void nibble_values(float* o, int64_t Dp, const float* p, const BlockRows& v, int64_t offset,
                          Ahead& ahead, int64_t D, Table table) {
  const int64_t upper = Dp / 2;
  for_lanes(D / 2, [&](int64_t d, int n) {
    Vec low[RT], high[RT];
    for (int r = 0; r < RT; ++r) {
      low[r] = load(o + r * Dp + d);
      high[r] = load(o + r * Dp + upper + d);
    }
    for (int i = 0; i < kBlock; ++i) {
      ahead.bytes(n);
      Vec x, y;
      load_pairs(v.at<nibbles>(i, offset + d), n, table, &x, &y);
      for (int r = 0; r < RT; ++r) {
        const Vec probability = set1(p[r * kBlock + i]);
        low[r] = fma(probability, x, low[r]);
        high[r] = fma(probability, y, high[r]);
      }
    }
    for (int r = 0; r < RT; ++r) {
      store(o + r * Dp + d, low[r]);
      store(o + r * Dp + upper + d, high[r]);
    }
  });
}

inline void wide_nibble_scores(float* s, const float* q, int64_t rows, const BlockRows* k,
                               const int64_t* offsets, Ahead& ahead, int m, int64_t D, int64_t Dp,
                               const CodeContext& context) {
  const Table table = load_table(context.numbers);
  for_row_tiles<8>(rows, [&](int64_t r, auto tile) {
    nibble_scores<tile.rows>(s + r * kBlock, q + r * Dp, rows * Dp, Dp, k, offsets, ahead, m, D, table);
  });
}

inline void wide_nibble_values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset,
                               Ahead& ahead, int64_t D, int64_t Dp, const CodeContext& context) {
  const Table table = load_table(context.numbers);
  for_row_tiles<4>(rows, [&](int64_t r, auto tile) {
    nibble_values<tile.rows>(o + r * Dp, Dp, p + r * kBlock, v, offset, ahead, D, table);
  });
}

// ---- integers -----------------------------------------------------------------------------------

#if defined(__AVX2__)

template <typename Codes>
void integer_key_scores(float* s, const float* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
                        Ahead& ahead, int m, int64_t D, int64_t Dp, const CodeContext&) {
  integer_scores<Codes>(s, q, rows, k, offsets, ahead, m, D, Dp);
}

// Probabilities that are not finite are widened: the result has NaN and infinity in the right places.
template <typename Codes>
void integer_or_wide_values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset,
                            Ahead& ahead, int64_t D, int64_t Dp, const CodeContext& context) {
  if (context.probabilities->finite)
    return integer_values<Codes>(o, *context.probabilities, rows, v, offset, ahead, D, Dp);
  for (int64_t r = 0; r < rows; ++r) {
    float row[kMaxHeadDim + 2 * kIntegerPad] = {}, unordered[kMaxHeadDim + 2 * kIntegerPad];
    if constexpr (Codes::kHalves == 2)
      wide_nibble_values(row, p + r * kBlock, 1, v, offset, ahead, D, Dp, context);
    else
      wide_values<int8_t>(row, p + r * kBlock, 1, v, offset, ahead, D, Dp, context);
    unorder_integer_channels(unordered, row, Dp);
    for (int64_t d = 0; d < Dp; ++d) o[r * Dp + d] += unordered[d];
  }
}

#endif

// Whether a side of these codes has integer products.
inline bool has_integers(const AttnDecodeParams& p, CacheCode code) {
#if defined(__AVX2__)
  return p.dtype != DType::f32 && (code == CacheCode::i8 || (code == CacheCode::i4 && !p.codebook));
#else
  (void)p, (void)code;
  return false;
#endif
}

// ---- the choice ---------------------------------------------------------------------------------

inline KeyKernel raw_key_kernel(DType dtype) {
  return {dtype == DType::f32    ? wide_scores<float>
          : dtype == DType::bf16 ? wide_scores<bf16>
                                 : wide_scores<f16>,
          kLanes, false};
}

inline ValueKernel raw_value_kernel(DType dtype) {
  return {dtype == DType::f32    ? wide_values<float>
          : dtype == DType::bf16 ? wide_values<bf16>
                                 : wide_values<f16>,
          kLanes, false};
}

inline KeyKernel key_kernel(const AttnDecodeParams& p) {
#if defined(__AVX2__)
  if (has_integers(p, p.key_code)) {
    if (p.key_code == CacheCode::i8) return {integer_key_scores<Int8Codes>, kIntegerPad, false, true};
    return {integer_key_scores<NibbleCodes>, kIntegerPad, true, true};
  }
#endif
  switch (p.key_code) {
    case CacheCode::i8:
      return {wide_scores<int8_t>, kLanes, false};
    case CacheCode::e4m3:
      return {wide_scores<e4m3>, kLanes, false};
    case CacheCode::i4:
      return {wide_nibble_scores, kLanes, true};
    default:
      return raw_key_kernel(p.dtype);
  }
}

inline ValueKernel value_kernel(const AttnDecodeParams& p) {
#if defined(__AVX2__)
  if (has_integers(p, p.value_code)) {
    if (p.value_code == CacheCode::i8) return {integer_or_wide_values<Int8Codes>, kIntegerPad, false, true};
    return {integer_or_wide_values<NibbleCodes>, kIntegerPad, true, true};
  }
#endif
  switch (p.value_code) {
    case CacheCode::i8:
      return {wide_values<int8_t>, kLanes, false};
    case CacheCode::e4m3:
      return {wide_values<e4m3>, kLanes, false};
    case CacheCode::i4:
      return {wide_nibble_values, kLanes, true};
    default:
      return raw_value_kernel(p.dtype);
  }
}

// The products of a task, in the interface of cpu_products.h. T: of q and out.
template <typename T>
class CodedProducts {
 public:
  using Element = T;
  using Query = float;
  static constexpr bool kCoded = true;

  explicit CodedProducts(const AttnDecodeParams& p)
      : p_(p), keys_(key_kernel(p)), values_(value_kernel(p)), context_{numbers_, &probabilities_} {
    for (int n = 0; n < kCodebook; ++n) numbers_[n] = p.codebook ? p.codebook[n] : float(n - 8);
  }
  CodedProducts(const CodedProducts&) = delete;

  static int64_t padded_rows(int64_t rows) { return rows; }
  static void begin_task(int64_t) {}
  static void end() {}
  static int64_t softmax_bytes(int, int64_t, int64_t) { return 0; }
  int64_t key_dim() const { return padded_dim(p_.D, keys_.pad, keys_.halves); }
  int64_t value_dim() const { return padded_dim(p_.Dv, values_.pad, values_.halves); }

  void store_query(float* q, int64_t r, int64_t, const float* x, int64_t Dp) const {
    float* to = q + r * Dp;
    const int64_t part = keys_.halves ? p_.D / 2 : p_.D, padded = keys_.halves ? Dp / 2 : Dp;
    for (int64_t d = 0; d < p_.D; d += part) {
      __builtin_memcpy(to, x + d, size_t(part) * sizeof(float));
      for (int64_t i = part; i < padded; ++i) to[i] = 0.f;
      to += padded;
    }
  }

  // After all rows of all sources of a head are stored.
  void finish_queries(float* q, int64_t rows, int m, int64_t Dp) const {
#if defined(__AVX2__)
    for (int64_t r = 0; keys_.integers && r < rows; ++r) round_query(q + r * Dp, m, rows * Dp, Dp);
#else
    (void)q, (void)rows, (void)m, (void)Dp;
#endif
  }

  // Before the products of a head with a block of tokens, whose factors lie in these rows.
  void at(int64_t head, const BlockRows* key_scales, const BlockRows* value_scales) {
    head_ = head;
    key_scales_ = key_scales;
    value_scales_ = value_scales;
  }

  void scores(float* s, const float* q, int64_t rows, const BlockRows* k, const int64_t* offsets,
              Ahead& ahead, int m, int64_t D, int64_t Dp) {
    if (!p_.key_scales) return keys_.scores(s, q, rows, k, offsets, ahead, m, D, Dp, context_);
    for (int j = 0; j < m; ++j) {
      float factors[kBlock];
      load_factors(key_scales_[j], head_ * p_.key_scales[j].stride_g, factors);
      float* part = j == 0 ? s : scaled_;
      keys_.scores(part, q + j * rows * Dp, rows, k + j, offsets + j, ahead, 1, D, Dp, context_);
      for (int64_t r = 0; r < rows; ++r) {
        for (int i = 0; i < kBlock; ++i) {
          const float x = part[r * kBlock + i] * factors[i];
          s[r * kBlock + i] = j == 0 ? x : s[r * kBlock + i] + x;
        }
      }
    }
  }

  void values(float* o, const float* p, int64_t rows, const BlockRows& v, int64_t offset, Ahead& ahead,
              int64_t D, int64_t Dp, int j) {
    if (p_.value_scales) {
      float factors[kBlock];
      load_factors(value_scales_[j], head_ * p_.value_scales[j].stride_g, factors);
      for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < kBlock; ++i) scaled_[r * kBlock + i] = p[r * kBlock + i] * factors[i];
      p = scaled_;
    }
#if defined(__AVX2__)
    if (values_.integers && (j == 0 || p_.value_scales)) round_probabilities(p, rows, &probabilities_);
#endif
    values_.values(o, p, rows, v, offset, ahead, D, Dp, context_);
  }

  void order_channels(float* o, int64_t Dp) const {
    const int64_t halves = values_.halves ? 2 : 1, part = p_.Dv / halves, padded = Dp / halves;
#if defined(__AVX2__)
    if (values_.integers) {
      float unordered[kMaxHeadDim + 2 * kIntegerPad];
      __builtin_memcpy(unordered, o, size_t(Dp) * sizeof(float));
      order_integer_channels(o, unordered, Dp);
    }
#endif
    if (padded == part) return;
    for (int64_t d = 0; d < (halves - 1) * part; ++d) o[part + d] = o[padded + d];
  }

 private:
  static void load_factors(const BlockRows& rows, int64_t offset, float* factors) {
    for (int i = 0; i < kBlock; ++i) factors[i] = widen(*rows.at<f16>(i, offset));
  }

  const AttnDecodeParams& p_;
  const KeyKernel keys_;
  const ValueKernel values_;
  alignas(64) float numbers_[kCodebook];
  const CodeContext context_;
  int64_t head_ = 0;
  const BlockRows *key_scales_ = nullptr, *value_scales_ = nullptr;
  IntegerProbabilities probabilities_;
  alignas(64) float scaled_[kMaxTaskRows * kBlock];  // scores of a source, or probabilities times factors
};

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
