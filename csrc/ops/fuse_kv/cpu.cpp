// Forward    out[b,t,g,d] = sum_j w[j,g,d] * x_j[b,t,g,d]
// Backward   dx_j = w_j (.) dout          dw_j[g,d] = sum_{b,t} dout[b,t,g,d] * x_j[b,t,g,d]
//
// Memory-bound: each element is read once and written once. If the heads of a token are adjacent they are one
// row of G * D channels, otherwise a row is a head. Weights stay in L1 or L2 from one token to the next.
// Large results use non-temporal stores of whole lines, which avoids reading the lines first.
//
// kRows tokens, a quarter of kFuseChunkTokens apart, are processed together: the hardware prefetcher follows
// one stream per page, and adjacent tokens would share it.
//
// Sums are fp32 (fp64 for fp64), rounded once. Weight gradients are summed per chunk of kFuseChunkTokens
// tokens, then pairwise over the chunks. The shape alone fixes the order, so that the bits do not depend on
// the number of threads.

#include "cpu/simd.h"
#include "ops/fuse_kv/params.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// fp64 is for gradient checks: one scalar lane with the functions of Vec.
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
static inline void stream(double* p, Scalar64 x) {
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

// Replaces output token (b, t) by its place in the caches. False if it is before the first token.
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

// A number of vectors as a type.
template <int n>
struct Vectors {
  static constexpr int count = n;
};

// Calls fn(first channel, lanes per vector, vectors) for the pieces of a row of D channels: whole cache lines
// of elements T, then single vectors. Each call is inlined, so that only the channel is a variable.
template <typename T, typename Fn>
inline void each_piece(int64_t D, const Fn& fn) {
  constexpr int lanes = Compute<T>::lanes;
  constexpr int vectors = lanes * sizeof(T) < 64 ? 64 / (lanes * sizeof(T)) : 1;
  int64_t d = 0;
  for (; d + vectors * lanes <= D; d += vectors * lanes) fn(d, lanes, Vectors<vectors>{});
  if (vectors > 1)
    for (; d + lanes <= D; d += lanes) fn(d, lanes, Vectors<1>{});
  if (d < D) fn(d, int(D - d), Vectors<1>{});
}

// One row per token instead of one per head, if the sources' heads are adjacent.
FuseKVParams with_longest_rows(const FuseKVParams& p) {
  FuseKVParams rows = p;
  bool together = true;
  for (int j = 0; j < p.m; ++j) together = together && p.sources[j].stride_g == p.D;
  if (together) rows.G = 1, rows.D = p.G * p.D;
  return rows;
}

// Whether non-temporal stores can write `data`, rows of p.D: every vector is aligned.
template <typename T>
bool streams(const FuseKVParams& p, const void* data) {
  constexpr int lanes = Compute<T>::lanes;
  return p.stream && p.D % lanes == 0 && uintptr_t(data) % (lanes * sizeof(T)) == 0;
}

template <bool kStream, typename T, typename V>
inline void write(T* p, V x, int n) {
  if (kStream)
    stream(p, x);
  else
    store(p, x, n);
}

// Sums of kRows tokens (b[r], t[r]) to rows of `out`, `next` elements apart.
template <typename T, bool kStream, int kRows>
void forward_rows(const FuseKVParams& p, const int64_t* b, const int64_t* t, T* out, int64_t next) {
  using C = Compute<T>;
  using Acc = typename C::Acc;
  const int m = p.m;
  const int64_t GD = p.G * p.D;
  for (int64_t g = 0; g < p.G; ++g, out += p.D) {
    const T* x[kMaxSources][kRows];
    for (int j = 0; j < m; ++j)
      for (int r = 0; r < kRows; ++r) x[j][r] = at<T>(p.sources[j], b[r], t[r], g);
    const Acc* weights = (const Acc*)p.weights + g * p.D;
    const auto piece = [&, out, weights](int64_t d, int n, auto vectors) __attribute__((always_inline)) {
      constexpr int count = vectors.count, lanes = C::lanes;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
          const int64_t channel = d + i * lanes;
          auto sum = mul(load(weights + channel, n), load(x[0][r] + channel, n));
          for (int j = 1; j < m; ++j)
            sum = fma(load(weights + j * GD + channel, n), load(x[j][r] + channel, n), sum);
          write<kStream>(out + r * next + channel, sum, n);
        }
    };
    each_piece<T>(p.D, piece);
  }
}

template <typename T, bool kStream>
void forward(const FuseKVParams& p, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  const int64_t GD = p.G * p.D;
  const auto one = [&](int64_t token) {
    int64_t b = token / p.T, t = token % p.T;
    T* out = (T*)p.out + token * GD;
    if (p.seq_lens && !find_in_cache(p, b, t))
      __builtin_memset(out, 0, size_t(GD) * sizeof(T));
    else
      forward_rows<T, kStream, 1>(p, &b, &t, out, 0);
  };
  while (begin < end) {
    const int64_t count = end - begin < kFuseChunkTokens ? end - begin : kFuseChunkTokens;
    const int64_t apart = p.seq_lens ? 0 : count / kRows, last = begin + count;
    for (int64_t i = 0; i < apart; ++i) {
      int64_t b[kRows], t[kRows];
      for (int r = 0; r < kRows; ++r) {
        b[r] = (begin + i + r * apart) / p.T;
        t[r] = (begin + i + r * apart) % p.T;
      }
      forward_rows<T, kStream, kRows>(p, b, t, (T*)p.out + (begin + i) * GD, apart * GD);
    }
    for (begin += kRows * apart; begin < last; ++begin) one(begin);
  }
  if (kStream) stream_fence();
}

// Gradients of sources [first, first + kSources) at kRows tokens, `apart` from each other. partial: the
// weight gradients of their chunk, or nullptr. Grad: element type of the source gradients. Local variables
// hold what results could alias for the compiler, and loops over them are unrolled.
template <typename T, typename Grad, bool kStream, int kSources, int kRows>
void backward_rows(const FuseKVParams& p, int64_t token, int64_t apart, int first,
                   typename Compute<T>::Acc* partial) {
  using C = Compute<T>;
  using Acc = typename C::Acc;
  const int64_t GD = p.G * p.D, next = apart * GD;
  const bool accumulate = p.accumulate;
  for (int64_t g = 0; g < p.G; ++g) {
    const int64_t row = token * GD + g * p.D;
    const T* dout = (const T*)p.grad_out + row;
    const T* x[kSources][kRows];
    Acc* sums[kSources];
    const Acc* weights[kSources];
    Grad* dx[kSources];
    for (int j = 0; j < kSources; ++j) {
      const int64_t channel = (first + j) * GD + g * p.D;
      for (int r = 0; r < kRows && partial; ++r)
        x[j][r] = at<T>(p.sources[first + j], (token + r * apart) / p.T, (token + r * apart) % p.T, g);
      sums[j] = partial ? partial + channel : nullptr;
      weights[j] = (const Acc*)p.weights + channel;
      dx[j] = p.grad_sources[first + j] ? (Grad*)p.grad_sources[first + j] + row : nullptr;
    }
    const auto piece = [&, x, sums, weights, dx](int64_t d, int n, auto vectors)
                           __attribute__((always_inline)) {
                             constexpr int count = vectors.count, lanes = C::lanes;
                             typename C::V go[kRows][count];
#pragma GCC unroll 4
                             for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                               for (int i = 0; i < count; ++i)
                                 go[r][i] = load(dout + r * next + d + i * lanes, n);
#pragma GCC unroll 4
                             for (int j = 0; j < kSources; ++j) {
                               if (sums[j]) {
#pragma GCC unroll 4
                                 for (int i = 0; i < count; ++i) {
                                   Acc* to = sums[j] + d + i * lanes;
                                   auto sum = load(to, n);
#pragma GCC unroll 4
                                   for (int r = 0; r < kRows; ++r)
                                     sum = fma(load(x[j][r] + d + i * lanes, n), go[r][i], sum);
                                   store(to, sum, n);
                                 }
                               }
                               if (dx[j] == nullptr) continue;
                               typename C::V w[count];
#pragma GCC unroll 4
                               for (int i = 0; i < count; ++i) w[i] = load(weights[j] + d + i * lanes, n);
#pragma GCC unroll 4
                               for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                                 for (int i = 0; i < count; ++i) {
                                   Grad* to = dx[j] + r * next + d + i * lanes;
                                   if (accumulate)
                                     store(to, fma(w[i], go[r][i], load(to, n)), n);
                                   else
                                     write<kStream>(to, mul(w[i], go[r][i]), n);
                                 }
                             }
                           };
    each_piece<T>(p.D, piece);
  }
}

template <typename T, typename Grad, bool kStream, int kRows>
void backward_tokens(const FuseKVParams& p, int64_t token, int64_t apart, typename Compute<T>::Acc* partial) {
  int j = 0;
  for (; j + 2 <= p.m; j += 2) backward_rows<T, Grad, kStream, 2, kRows>(p, token, apart, j, partial);
  if (j < p.m) backward_rows<T, Grad, kStream, 1, kRows>(p, token, apart, j, partial);
}

template <typename T, typename Grad, bool kStream>
void backward(const FuseKVParams& p, int64_t begin, int64_t end) {
  using Acc = typename Compute<T>::Acc;
  constexpr int kRows = 4;
  const int64_t tokens = p.B * p.T, row = p.m * p.G * p.D;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    int64_t token = chunk * kFuseChunkTokens;
    const int64_t last = token + kFuseChunkTokens < tokens ? token + kFuseChunkTokens : tokens;
    Acc* partial = p.partial_weights ? (Acc*)p.partial_weights + chunk * row : nullptr;
    if (partial) __builtin_memset(partial, 0, size_t(row) * sizeof(Acc));
    const int64_t apart = (last - token) / kRows;
    for (int64_t t = 0; t < apart; ++t)
      backward_tokens<T, Grad, kStream, kRows>(p, token + t, apart, partial);
    for (token += kRows * apart; token < last; ++token)
      backward_tokens<T, Grad, kStream, 1>(p, token, 0, partial);
  }
  if (kStream) stream_fence();
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

void fuse_kv_forward(const FuseKVParams& params, int64_t begin, int64_t end) {
  const FuseKVParams p = with_longest_rows(params);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (streams<T>(p, p.out))
      forward<T, true>(p, begin, end);
    else
      forward<T, false>(p, begin, end);
  });
}

void fuse_kv_backward(const FuseKVParams& params, int64_t begin, int64_t end) {
  const FuseKVParams p = with_longest_rows(params);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool stream = !p.accumulate;
    for (int j = 0; j < p.m; ++j) stream = stream && streams<T>(p, p.grad_sources[j]);
    if (sizeof(T) == 2 && p.grad_dtype != p.dtype)
      backward<T, typename Compute<T>::Acc, false>(p, begin, end);
    else if (stream)
      backward<T, T, true>(p, begin, end);
    else
      backward<T, T, false>(p, begin, end);
  });
}

void fuse_kv_reduce_weights(const FuseKVParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) { reduce_weights<typename decltype(tag)::type>(p, begin, end); });
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
