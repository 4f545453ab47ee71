// cache[pos] = new[s] with pos = len - S + s;    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)
//
// The rotation of pairs of channels of keys and queries is computed in fp32 and rounded once. Queries at pos
// < 0 are not rotated.
//
// Memory-bound, and in decoding dominated by the launch: queries, keys and values share one. The unit of work
// is a row, one head of one token. Eight lanes own a row and move 128 contiguous bytes at a time. A lane has
// both 16-byte pieces of its rotated pairs, so that lanes exchange nothing and shared memory is not needed.
// Four rows fill a warp at head dim 64; at 128 every lane has its one pair of pieces in flight. Rows whose
// addresses or pairs are not aligned to 16 bytes are moved element by element.

#include "ops/append_kvcache/params.h"

#include "cuda/elements.cuh"

namespace fusedkv {

namespace {

constexpr int kLanes = 8;  // per row
constexpr int kThreads = 128;
constexpr int kRows = kThreads / kLanes;  // per block

struct Params {
  AppendKVCacheParams append;
  bool query_pieces, key_pieces, value_pieces;  // whether rows can be moved 16 bytes at a time
};

// Cosines or sines of kCount channels, with the widest aligned loads.
template <int kCount>
__device__ __forceinline__ void load_table(const float* from, float (&x)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = load(reinterpret_cast<const float4*>(from + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = load(from + i);
  }
}

template <typename T>
__device__ __forceinline__ void rotate(T x0, T x1, float cos, float sin, T* out0, T* out1) {
  const auto wide0 = widen(x0), wide1 = widen(x1);
  narrow(wide0 * cos - wide1 * sin, out0);
  narrow(wide1 * cos + wide0 * sin, out1);
}

// The first `rotated` channels of a row, whose pairs lie in two pieces (half-split) or in one (interleaved).
template <typename T>
__device__ __forceinline__ void rotate_pieces(T* to, const T* from, const float* cos, const float* sin,
                                              int rotated, bool interleaved, int lane) {
  constexpr int kVec = Piece<T>::kVec;
  const auto piece_of = [&](int channel) {
    return Piece<T>{load(reinterpret_cast<const uint4*>(from + channel))};
  };
  const auto put = [&](int channel, const Piece<T>& x) {
    store(reinterpret_cast<uint4*>(to + channel), x.raw);
  };
  if (interleaved) {
    for (int channel = lane * kVec; channel < rotated; channel += kLanes * kVec) {
      Piece<T> x = piece_of(channel);
      float c[kVec / 2], s[kVec / 2];
      load_table(cos + channel / 2, c);
      load_table(sin + channel / 2, s);
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i)
        rotate(x.element[2 * i], x.element[2 * i + 1], c[i], s[i], &x.element[2 * i], &x.element[2 * i + 1]);
      put(channel, x);
    }
  } else {
    const int half = rotated / 2;
    for (int channel = lane * kVec; channel < half; channel += kLanes * kVec) {
      Piece<T> x0 = piece_of(channel), x1 = piece_of(channel + half);
      float c[kVec], s[kVec];
      load_table(cos + channel, c);
      load_table(sin + channel, s);
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        rotate(x0.element[i], x1.element[i], c[i], s[i], &x0.element[i], &x1.element[i]);
      put(channel, x0);
      put(channel + half, x1);
    }
  }
}

template <typename T>
__device__ __forceinline__ void move_row(T* to, const T* from, const float* cos, const float* sin,
                                         int rotated, int D, bool interleaved, bool pieces, int lane) {
  constexpr int kVec = Piece<T>::kVec;
  if (pieces) {
    if (rotated) rotate_pieces(to, from, cos, sin, rotated, interleaved, lane);
    for (int channel = rotated + lane * kVec; channel < D; channel += 2 * kLanes * kVec) {
      const int next = channel + kLanes * kVec;  // both loads are issued before the first store
      const uint4 x = load(reinterpret_cast<const uint4*>(from + channel));
      uint4 y{};
      if (next < D) y = load(reinterpret_cast<const uint4*>(from + next));
      store(reinterpret_cast<uint4*>(to + channel), x);
      if (next < D) store(reinterpret_cast<uint4*>(to + next), y);
    }
    return;
  }
  const int half = rotated / 2;
  for (int j = lane; j < half; j += kLanes) {
    const int i0 = interleaved ? 2 * j : j, i1 = interleaved ? 2 * j + 1 : j + half;
    T y0, y1;
    rotate(load(from + i0), load(from + i1), load(cos + j), load(sin + j), &y0, &y1);
    store(to + i0, y0);
    store(to + i1, y1);
  }
  for (int i = rotated + lane; i < D; i += kLanes) store(to + i, load(from + i));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) append_kvcache_kernel(const __grid_constant__ Params params) {
  ptx::grid_dependency_wait();
  const AppendKVCacheParams& p = params.append;
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t heads = p.query.heads + p.key.heads + p.value.heads;
  const int64_t rows = p.B * p.S * heads;
  const int64_t index = int64_t(blockIdx.x) * kRows + threadIdx.x / kLanes;
  if (index >= rows) return;
  const int64_t token = index / heads, b = token / p.S, s = token - b * p.S;
  int64_t head = index - token * heads;
  const int64_t length = load(p.seq_lens + b);
  const int64_t pos = length - p.S + s;
  const bool in_range = length <= p.capacity && pos >= 0 && (!p.cos || pos < p.rotary_rows);

  int64_t row = b, slot = s;  // of a query
  if (head >= p.query.heads) {
    if (!in_range) return;
    slot = pos;
    if (p.block_table) {
      const int64_t page = pos / p.page_size;
      row = load(p.block_table + b * p.block_table_stride + page);
      slot = pos - page * p.page_size;
      if (row < 0 || row >= p.num_pages) return;
    }
  }
  const T* from;
  T* to;
  bool pieces;
  int D, rotated = p.cos && in_range ? int(p.rotary_dim) : 0;
  const auto take = [&](const AppendTensor& x, bool in_pieces) {
    from = static_cast<const T*>(x.src) + b * x.src_stride_b + s * x.src_stride_s + head * x.src_stride_g;
    to = static_cast<T*>(x.dst) + row * x.dst_stride_b + slot * x.dst_stride_t + head * x.dst_stride_g;
    D = int(x.D);
    pieces = in_pieces;
  };
  if (head < p.query.heads) {
    take(p.query, params.query_pieces);
  } else if (head -= p.query.heads; head < p.key.heads) {
    take(p.key, params.key_pieces);
  } else {
    head -= p.key.heads;
    take(p.value, params.value_pieces);
    rotated = 0;
  }
  const int64_t angles = pos * (rotated / 2);
  move_row(to, from, p.cos + angles, p.sin + angles, rotated, D, p.interleaved, pieces, lane);
}

bool aligned16(const void* x) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Whether every piece of every row starts at a multiple of 16 bytes, and every pair lies in whole pieces.
template <typename T>
bool in_pieces(const AppendTensor& x, const AppendKVCacheParams& p, bool rotates) {
  constexpr int kVec = Piece<T>::kVec;
  for (const int64_t stride :
       {x.src_stride_b, x.src_stride_s, x.src_stride_g, x.dst_stride_b, x.dst_stride_t, x.dst_stride_g})
    if (stride % kVec) return false;
  if (!aligned16(x.src) || !aligned16(x.dst) || x.D % kVec) return false;
  if (!rotates || !p.cos) return true;
  return aligned16(p.cos) && aligned16(p.sin) &&
         (p.interleaved ? p.rotary_dim : p.rotary_dim / 2) % kVec == 0;
}

}  // namespace

int append_kvcache_cuda(const AppendKVCacheParams& p, void* stream) {
  const int64_t rows = p.B * p.S * (p.query.heads + p.key.heads + p.value.heads);
  if (rows == 0) return 0;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  int error = 0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Params params{p, in_pieces<T>(p.query, p, true), in_pieces<T>(p.key, p, true),
                        in_pieces<T>(p.value, p, false)};
    error = launch_overlapped(append_kvcache_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream,
                              params);
  });
  return error;
}

}  // namespace fusedkv
