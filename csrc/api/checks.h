// Argument checks of the ops. Every message names the argument, what it must be and what it is.
//
// The stable ABI carries only std::runtime_error. Its text starts with the Python type that the Python
// package raises instead.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/limits.h"

namespace fusedkv::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* python_type, const Parts&... parts) {
  std::ostringstream text;
  text << "fusedkv " << python_type << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) fail("ValueError", parts...);
}

template <typename... Parts>
void check_type(bool ok, const Parts&... parts) {
  if (!ok) fail("TypeError", parts...);
}

// Prints a tensor's sizes as (2, 3, 4).
struct Shape {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "(";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
  return out << ")";
}

// The name of an argument, or of one tensor of a list. It is formatted only when a check fails.
struct Name {
  const char* text;
  int64_t index = -1;  // negative: not one of a list

  Name(const char* text) : text(text) {}
  Name(const char* text, size_t index) : text(text), index(int64_t(index)) {}
};

inline std::ostream& operator<<(std::ostream& out, Name name) {
  out << name.text;
  if (name.index >= 0) out << "[" << name.index << "]";
  return out;
}

inline Name name_of(const char* name, size_t index) {
  return {name, index};
}

// Prints a dtype as torch's Python name.
struct DTypeOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const DTypeOf& x) {
  switch (x.tensor.scalar_type()) {
    case ScalarType::Double:
      return out << "float64";
    case ScalarType::Float:
      return out << "float32";
    case ScalarType::BFloat16:
      return out << "bfloat16";
    case ScalarType::Half:
      return out << "float16";
    case ScalarType::Char:
      return out << "int8";
    case ScalarType::Byte:
      return out << "uint8";
    case ScalarType::Float8_e4m3fn:
      return out << "float8_e4m3fn";
    case ScalarType::Int:
      return out << "int32";
    case ScalarType::Long:
      return out << "int64";
    default:
      return out << "another dtype";
  }
}

inline DType dtype_of(const Tensor& x, Name name) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail("TypeError", name, " must be float32, bfloat16 or float16 (or float64 in fuse_kv), got ",
           DTypeOf{x});
  }
}

inline void check_device(const Tensor& x, Name name, bool cuda) {
  check_value(cuda ? x.is_cuda() : x.is_cpu(), name, " must be on ", cuda ? "a GPU" : "the CPU",
              ", got another device; move all arguments to one device");
}

inline void check_same_dtype(const Tensor& x, Name name, const Tensor& like, Name like_name) {
  check_type(x.scalar_type() == like.scalar_type(), name, " must be ", DTypeOf{like}, " as ", like_name,
             ", got ", DTypeOf{x}, "; convert one with .to()");
}

// A tensor of vectors: 4 dims, the last one contiguous. (A dim of size 1 or an empty tensor may have any
// stride.)
inline void check_rank4(const Tensor& x, Name name, const char* expected) {
  check_value(x.dim() == 4, name, " must have 4 dims ", expected, ", got ", Shape{x});
  check_value(x.size(3) <= 1 || x.numel() == 0 || x.stride(3) == 1, name,
              " must have stride 1 in its last dim, got ", x.stride(3), "; call .contiguous()");
}

// The head dims of the kernels of fuse_kv and cached attention. dispatch.native_head_dim is the same rule;
// for other head dims the Python package composes these ops with torch's.
inline void check_head_dim(int64_t head_dim, Name name) {
  check_value(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, name,
              " must have a head dim that is a multiple of 8 from 8 to ", kMaxHeadDim, ", got ", head_dim);
}

// Ops that only copy channels accept any number of them.
inline void check_has_channels(int64_t head_dim, Name name) {
  check_value(head_dim >= 1, name, " must have a head dim of at least 1, got ", head_dim);
}

inline void check_same_shape(const Tensor& x, Name name, const Tensor& like, Name like_name) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  check_value(same, name, " must have shape ", Shape{like}, " as ", like_name, ", got ", Shape{x});
}

inline void check_count(size_t count, const char* name) {
  check_value(count >= 1 && count <= kMaxSources, name, " must hold 1 to ", kMaxSources, " tensors, got ",
              count);
}

// Weights have one form: (m, G, D), contiguous, in the dtype of sums.
inline void check_weights(const Tensor& w, const char* name, int64_t m, int64_t G, int64_t D, bool f64,
                          bool cuda) {
  check_device(w, name, cuda);
  check_type(w.scalar_type() == (f64 ? ScalarType::Double : ScalarType::Float), name, " must be ",
             f64 ? "float64" : "float32", ", got ", DTypeOf{w});
  check_value(w.dim() == 3 && w.size(0) == m && w.size(1) == G && w.size(2) == D, name, " must have shape (",
              m, ", ", G, ", ", D, "), got ", Shape{w});
  check_value(w.is_contiguous(), name, " must be contiguous; call .contiguous()");
}

inline void check_int32(const Tensor& x, const char* name, int64_t dims, bool cuda) {
  check_device(x, name, cuda);
  check_type(x.scalar_type() == ScalarType::Int, name, " must be int32, got ", DTypeOf{x},
             "; convert it with .to(torch.int32)");
  check_value(x.dim() == dims, name, " must have ", dims, dims == 1 ? " dim (B,)" : " dims (B, max_pages)",
              ", got ", Shape{x});
  check_value(x.numel() <= 1 || x.size(dims - 1) <= 1 || x.stride(dims - 1) == 1, name,
              " must be contiguous in its last dim; call .contiguous()");
}

}  // namespace fusedkv::api
