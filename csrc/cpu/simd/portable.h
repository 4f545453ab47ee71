// 8 floats in fixed-size loops, which any compiler turns into its baseline vectors. See cpu/simd.h.
#pragma once

#include "cpu/simd/scalar.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

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

// The numbers of the 4-bit codes, and those of kLanes pairs of codes, of which the first n are read.
struct Table {
  const float* numbers;
};
static inline Table load_table(const float* numbers) {
  return {numbers};
}
static inline void load_pairs(const nibbles* p, int n, Table table, Vec* low, Vec* high) {
  *low = map([=](int i) { return table.numbers[i < n ? p[i].bits & 15 : 0]; });
  *high = map([=](int i) { return table.numbers[i < n ? p[i].bits >> 4 : 0]; });
}

template <typename T>
static inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) narrow(x.v[i], p + i);
}
template <typename T>
static inline void stream(T* p, Vec x) {
  store(p, x);
}
static inline void stream_fence() {}
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

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
