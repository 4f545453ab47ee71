// Element types of caches and activations, as plain storage; no torch, no CUDA types.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace fusedkv {

enum class DType : int { f64, f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// Codes: elements of caches that are numbers of 8 bits or fewer.
struct e4m3 {  // 1 sign, 4 exponent and 3 mantissa bits; no infinity, NaN has all other bits set
  uint8_t bits;
};

struct nibbles {  // two codes of 4 bits: of channel d in the low half, of channel d + D / 2 in the high half
  uint8_t bits;
};

// How a cache stores its elements.
enum class CacheCode : int {
  raw,   // in the dtype of q
  i8,    // int8_t
  e4m3,  // e4m3
  i4,    // nibbles: D / 2 elements for D channels
};

constexpr int kCodebook = 16;  // numbers that the codes of 4 bits stand for

static inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    default:
      return 2;
  }
}

// Elements of a cache for so many channels, and the bytes of each.
FUSEDKV_HOST_DEVICE int64_t cache_elements(CacheCode code, int64_t channels) {
  return code == CacheCode::i4 ? channels / 2 : channels;
}

static inline int64_t size_of(CacheCode code, DType dtype) {
  return code == CacheCode::raw ? size_of(dtype) : 1;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls fn(TypeTag<T>{}) with the C++ type of `dtype`: the one place where a run-time dtype becomes a
// template argument.
template <typename Fn>
static inline void dispatch_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::f64:
      return fn(TypeTag<double>{});
    case DType::f32:
      return fn(TypeTag<float>{});
    case DType::bf16:
      return fn(TypeTag<bf16>{});
    case DType::f16:
      return fn(TypeTag<f16>{});
  }
}

}  // namespace fusedkv
