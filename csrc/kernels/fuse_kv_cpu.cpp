// Forward    out[b,t,g,d] = sum_j w[j,g,d] * x_j[b,t,g,d]
// Backward   dx_j = w_j (.) dout          dw_j[g,d] = sum_{b,t} dout[b,t,g,d] * x_j[b,t,g,d]
//
// Memory-bound: each element is read once and written once. A token's G * D weights stay in L1 from one token
// to the next. Sums run in fp32 (fp64 for fp64) and are rounded once. Weight gradients are summed per chunk
// of kFuseChunkTokens tokens, then pairwise over the chunks: the order is fixed by the shape alone, so the
// bits do not depend on the number of threads. From caches, a token is looked up in the block table first.

#include "kernels/cpu_simd.h"
#include "kernels/fuse_kv.h"

namespace fusedkv {
namespace FUSEDKV_LEVEL {

// fp64 exists for gradient checks: one scalar lane behind the same names as Vec.
struct Scalar64 {
  double v;
};
static inline Scalar64 fma(Scalar64 a, Scalar64 b, Scalar64 c) {
  return {a.v * b.v + c.v};
}
static inline Scalar64 mul(Scalar64 a, Scalar64 b) {
  return {a.v * b.v};
}
static inline Scalar64 load(const double* p, int) {
  return {*p};
}
static inline void store(double* p, Scalar64 x, int) {
  *p = x.v;
}

namespace {

template <typename T>
struct Compute {
  using Acc = float;
  using V = Vec;
  static constexpr int lanes = kLanes;
};
template <>
struct Compute<double> {
  using Acc = double;
  using V = Scalar64;
  static constexpr int lanes = 1;
};

template <typename T>
inline const T* at(const TokenTensor& x, int64_t b, int64_t t, int64_t g) {
  return (const T*)x.data + b * x.stride_b + t * x.stride_t + g * x.stride_g;
}

// Turns output token (b, t) into its place in the caches; false: it stands before the sequence's first.
inline bool find_in_cache(const FuseKVParams& p, int64_t& b, int64_t& t) {
  const int64_t position = p.seq_lens[b] - p.T + t;
  if (position < 0) return false;
  t = position;
  if (p.block_table) {
    b = p.block_table[b * p.block_table_stride + position / p.page_size];
    t = position % p.page_size;
  }
  return true;
}

template <typename T>
void forward(const FuseKVParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const auto* weights = (const typename C::Acc*)p.weights;
  const int64_t GD = p.G * p.D;
  for (int64_t token = begin; token < end; ++token) {
    int64_t b = token / p.T, t = token % p.T;
    if (p.seq_lens && !find_in_cache(p, b, t)) {
      __builtin_memset((T*)p.out + token * GD, 0, size_t(GD) * sizeof(T));
      continue;
    }
    for (int64_t g = 0; g < p.G; ++g) {
      const T* x[kMaxSources];
      for (int j = 0; j < p.m; ++j) x[j] = at<T>(p.sources[j], b, t, g);
      const auto* w = weights + g * p.D;
      T* out = (T*)p.out + token * GD + g * p.D;
      for (int64_t d = 0; d < p.D; d += C::lanes) {
        const int n = int(p.D - d < C::lanes ? p.D - d : C::lanes);
        typename C::V acc = mul(load(w + d, n), load(x[0] + d, n));
        for (int j = 1; j < p.m; ++j) acc = fma(load(w + j * GD + d, n), load(x[j] + d, n), acc);
        store(out + d, acc, n);
      }
    }
  }
}

// Grad: of the source gradients.
template <typename T, typename Grad>
void backward(const FuseKVParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using Acc = typename C::Acc;
  const int64_t tokens = p.B * p.T, GD = p.G * p.D;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kFuseChunkTokens;
    const int64_t last = first + kFuseChunkTokens < tokens ? first + kFuseChunkTokens : tokens;
    Acc* partial = p.partial_weights ? (Acc*)p.partial_weights + chunk * p.m * GD : nullptr;
    if (partial) __builtin_memset(partial, 0, size_t(p.m * GD) * sizeof(Acc));
    for (int64_t token = first; token < last; ++token) {
      const int64_t b = token / p.T, t = token % p.T;
      for (int64_t g = 0; g < p.G; ++g) {
        const T* dout = (const T*)p.grad_out + token * GD + g * p.D;
        for (int j = 0; j < p.m; ++j) {
          const T* x = at<T>(p.sources[j], b, t, g);
          const int64_t channel = j * GD + g * p.D;
          const Acc* w = (const Acc*)p.weights + channel;
          Grad* dx = p.grad_sources[j] ? (Grad*)p.grad_sources[j] + token * GD + g * p.D : nullptr;
          for (int64_t d = 0; d < p.D; d += C::lanes) {
            const int n = int(p.D - d < C::lanes ? p.D - d : C::lanes);
            const auto go = load(dout + d, n);
            if (dx && p.accumulate)
              store(dx + d, fma(load(w + d, n), go, load(dx + d, n)), n);
            else if (dx)
              store(dx + d, mul(load(w + d, n), go), n);
            if (partial)
              store(partial + channel + d, fma(load(x + d, n), go, load(partial + channel + d, n)), n);
          }
        }
      }
    }
  }
}

// Pairwise sum over the chunks, in place: chunk i += chunk i + step for step = 1, 2, 4, ...
template <typename T>
void reduce_weights(const FuseKVParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using Acc = typename C::Acc;
  const int64_t chunks = num_chunks(p), row = p.m * p.G * p.D;
  Acc* partial = (Acc*)p.partial_weights;
  const int64_t from = begin * 8, to = end * 8;
  for (int64_t step = 1; step < chunks; step *= 2) {
    for (int64_t i = 0; i + step < chunks; i += 2 * step) {
      Acc *a = partial + i * row, *b = partial + (i + step) * row;
      for (int64_t d = from; d < to; ++d) a[d] += b[d];
    }
  }
  for (int64_t d = from; d < to; ++d) ((Acc*)p.grad_weights)[d] = chunks ? partial[d] : Acc(0);
}

}  // namespace

void fuse_kv_forward(const FuseKVParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(p, begin, end); });
}

void fuse_kv_backward(const FuseKVParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (sizeof(T) == 2 && p.grad_dtype != p.dtype)
      backward<T, typename Compute<T>::Acc>(p, begin, end);
    else
      backward<T, T>(p, begin, end);
  });
}

void fuse_kv_reduce_weights(const FuseKVParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) { reduce_weights<typename decltype(tag)::type>(p, begin, end); });
}

}  // namespace FUSEDKV_LEVEL
}  // namespace fusedkv
