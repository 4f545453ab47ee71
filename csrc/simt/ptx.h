// The host twin of every function of cuda/ptx.cuh, under the same name.
//
// Checks: addresses (memory.h), and that all 32 lanes take part where PTX says .sync.aligned. Layouts of
// fragments are those of the PTX ISA; products and sums of mma run in fp32.
//
// Does not detect: differences of rounding in mma and ex2, cache hints, acquire and release ordering.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/memory.h"

namespace fusedkv::simt {

constexpr uint32_t kAllLanes = 0xffffffff;

template <typename To, typename From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <typename T>
inline T load_shared(uint32_t address, Site site) {
  T x;
  memcpy(&x, shared_at(address, sizeof x, "load", site), sizeof x);
  return x;
}

template <typename T>
inline void store_shared(uint32_t address, T x, Site site) {
  memcpy(shared_at(address, sizeof x, "store", site), &x, sizeof x);
}

inline float float_of_bf16(uint16_t x) {
  return bit_cast<float>(uint32_t(x) << 16);
}

inline float float_of_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 0x3ff;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(mantissa);
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To nearest, ties to even; NaN becomes PTX's canonical NaN.
inline uint16_t bf16_of_float(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t f16_of_float(float x) {
  const uint32_t u = bit_cast<uint32_t>(x) & 0x7fffffff, sign = bit_cast<uint32_t>(x) >> 16 & 0x8000;
  if (u > 0x7f800000) return 0x7fff;
  if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65520 on: infinity
  if (u < 0x38800000)  // subnormal: multiples of 2^-24, rounded by the sum with 2^23
    return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(u) * 0x1p24f + 0x1p23f) & 0x7fff));
  return uint16_t(sign | (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13);
}

inline uint16_t half_of(uint32_t pair, int which) {
  return uint16_t(which ? pair >> 16 : pair);
}

struct MmaLane {
  float (*c)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};

template <float (*kWiden)(uint16_t)>
inline void mma_m16n8k16(void* const* lanes, uint32_t) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaLane& x = *static_cast<const MmaLane*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r)
        a[group + 8 * (r % 2)][pair + h + 8 * (r / 2)] = kWiden(half_of((*x.a)[r], h));
      for (int r = 0; r < 2; ++r) b[pair + h + 8 * r][group] = kWiden(half_of((*x.b)[r], h));
      for (int r = 0; r < 2; ++r) c[group + 8 * r][pair + h] = (*x.c)[2 * r + h];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float (&out)[4] = *static_cast<const MmaLane*>(lanes[lane])->c;
    for (int r = 0; r < 4; ++r) out[r] = c[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2];
  }
}

struct LdmatrixLane {
  const unsigned char* row;
  uint32_t (*r)[4];
};

template <bool kTrans>
inline void ldmatrix_x4(void* const* lanes, uint32_t) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t x[8][8];
    for (int row = 0; row < 8; ++row)
      memcpy(x[row], static_cast<LdmatrixLane*>(lanes[8 * matrix + row])->row, 16);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = kTrans ? x[j][i] : x[i][j], high = kTrans ? x[j + 1][i] : x[i][j + 1];
      (*static_cast<LdmatrixLane*>(lanes[lane])->r)[matrix] = low | high << 16;
    }
  }
}

inline void movmatrix_trans(void* const* lanes, uint32_t) {
  uint16_t x[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int h = 0; h < 2; ++h)
      x[lane / 4][lane % 4 * 2 + h] = half_of(*static_cast<uint32_t*>(lanes[lane]), h);
  for (int lane = 0; lane < kWarpSize; ++lane)
    *static_cast<uint32_t*>(lanes[lane]) = x[lane % 4 * 2][lane / 4] | uint32_t(x[lane % 4 * 2 + 1][lane / 4])
                                                                           << 16;
}

}  // namespace fusedkv::simt

namespace fusedkv::ptx {

using simt::Site;

// ---- shared memory -----------------------------------------------------------------------------

inline uint32_t ld_shared_b32(uint32_t address, Site site = Site::here()) {
  return simt::load_shared<uint32_t>(address, site);
}

inline float ld_shared_f32(uint32_t address, Site site = Site::here()) {
  return simt::load_shared<float>(address, site);
}

inline uint4 ld_shared_b128(uint32_t address, Site site = Site::here()) {
  return simt::load_shared<uint4>(address, site);
}

inline void st_shared_b32(uint32_t address, uint32_t x, Site site = Site::here()) {
  simt::store_shared(address, x, site);
}

inline void st_shared_f32(uint32_t address, float x, Site site = Site::here()) {
  simt::store_shared(address, x, site);
}

inline void st_shared_b128(uint32_t address, uint4 x, Site site = Site::here()) {
  simt::store_shared(address, x, site);
}

// ---- asynchronous copies global -> shared ------------------------------------------------------

inline void cp_async_16(uint32_t to, const void* from, uint32_t bytes, Site site = Site::here()) {
  simt::copy_16(to, from, bytes, site);
}

inline void cp_async_commit() {
  simt::commit_copies();
}

template <int kPending>
inline void cp_async_wait() {
  simt::wait_for_copies(kPending);
}

// ---- global memory -----------------------------------------------------------------------------

inline uint4 ld_global_stream_b128(const void* from, Site site = Site::here()) {
  simt::check_global(from, sizeof(uint4), "load", site);
  uint4 x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline int32_t atom_add_acq_rel(int32_t* address, int32_t x, Site site = Site::here()) {
  simt::check_global(address, sizeof x, "atomic", site);
  const int32_t old = *address;
  *address = int32_t(uint32_t(old) + uint32_t(x));
  return old;
}

// ---- kernels that follow each other ------------------------------------------------------------

inline void grid_dependency_wait() {}  // kernels never overlap here

// ---- tensor cores ------------------------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Site site = Site::here()) {
  simt::LdmatrixLane lane{simt::shared_at(address, 16, "ldmatrix", site), &r};
  simt::warp_collective("ldmatrix", simt::ldmatrix_x4<false>, simt::kAllLanes, &lane, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, Site site = Site::here()) {
  simt::LdmatrixLane lane{simt::shared_at(address, 16, "ldmatrix", site), &r};
  simt::warp_collective("ldmatrix.trans", simt::ldmatrix_x4<true>, simt::kAllLanes, &lane, site);
}

inline uint32_t movmatrix_trans(uint32_t x, Site site = Site::here()) {
  simt::warp_collective("movmatrix", simt::movmatrix_trans, simt::kAllLanes, &x, site);
  return x;
}

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Site site = Site::here()) {
  simt::MmaLane lane{&c, &a, &b};
  simt::warp_collective("mma bf16", simt::mma_m16n8k16<simt::float_of_bf16>, simt::kAllLanes, &lane, site);
}

inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::here()) {
  simt::MmaLane lane{&c, &a, &b};
  simt::warp_collective("mma f16", simt::mma_m16n8k16<simt::float_of_f16>, simt::kAllLanes, &lane, site);
}

// ---- arithmetic --------------------------------------------------------------------------------

// The default mode, whose numbers of bytes are below 8.
inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  uint32_t x = 0;
  for (int i = 0; i < 4; ++i) x |= uint32_t(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  return x;
}

inline float ex2(float x) {
  return exp2f(x);
}

inline uint32_t cvt_bf16x2(float low, float high) {
  return simt::bf16_of_float(low) | uint32_t(simt::bf16_of_float(high)) << 16;
}

inline uint32_t cvt_f16x2(float low, float high) {
  return simt::f16_of_float(low) | uint32_t(simt::f16_of_float(high)) << 16;
}

inline float cvt_f32_f16(uint16_t x) {
  return simt::float_of_f16(x);
}

}  // namespace fusedkv::ptx
