// Elements of caches and activations on the GPU: 16-byte accesses, widening to the type of sums, rounding.
#pragma once

#include "common/dtype.h"
#include "cuda/gpu.cuh"

namespace fusedkv {

template <typename T>
struct SumType {
  using type = float;
};

template <>
struct SumType<double> {
  using type = double;
};

__device__ __forceinline__ double widen(double x) {
  return x;
}

__device__ __forceinline__ float widen(float x) {
  return x;
}

__device__ __forceinline__ float widen(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}

__device__ __forceinline__ float widen(f16 x) {
  return ptx::cvt_f32_f16(x.bits);
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ void narrow(double x, double* out) {
  *out = x;
}

__device__ __forceinline__ void narrow(float x, float* out) {
  *out = x;
}

__device__ __forceinline__ void narrow(float x, bf16* out) {
  out->bits = uint16_t(ptx::cvt_bf16x2(x, 0.f));
}

__device__ __forceinline__ void narrow(float x, f16* out) {
  out->bits = uint16_t(ptx::cvt_f16x2(x, 0.f));
}

// N adjacent elements, loaded and stored as one.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T element[N];
};

// Four floats in shared memory, which is accessed by address (ptx.cuh).
__device__ __forceinline__ uint4 bits_of(const Vector<float, 4>& x) {
  return {__float_as_uint(x.element[0]), __float_as_uint(x.element[1]), __float_as_uint(x.element[2]),
          __float_as_uint(x.element[3])};
}

__device__ __forceinline__ Vector<float, 4> floats_of(uint4 x) {
  return {{__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)}};
}

// 16 bytes of elements, loaded and stored as one.
template <typename T>
union Piece {
  static constexpr int kVec = 16 / sizeof(T);
  uint4 raw;
  T element[kVec];
};

// N adjacent elements, a multiple of a piece, in fp32. `pieces`: they start at a multiple of 16 bytes.
template <typename T, int N>
__device__ __forceinline__ void load_channels(float (&x)[N], const T* from, bool pieces) {
  if (pieces) {
#pragma unroll
    for (int i = 0; i < N; i += Piece<T>::kVec) {
      Piece<T> piece;
      piece.raw = load(reinterpret_cast<const uint4*>(from + i));
#pragma unroll
      for (int k = 0; k < Piece<T>::kVec; ++k) x[i + k] = float(widen(piece.element[k]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = float(widen(load(from + i)));
  }
}

}  // namespace fusedkv
