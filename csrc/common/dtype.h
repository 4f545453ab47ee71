// Element types of caches and activations, as plain storage; no torch, no CUDA types.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedkv {

enum class DType : int { f64, f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

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
