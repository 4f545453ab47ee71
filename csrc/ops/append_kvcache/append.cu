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
//
// A cache of codes gets u = (x - c) / s of the rotated key or of the value, in fp32, rounded to nearest even
// and saturated. A lane makes the 8 bytes of 8 or 16 channels. Calls without such a cache have a kernel of
// their own.

#include "ops/append_kvcache/params.h"

#include <initializer_list>

#include "common/codes.h"
#include "cuda/elements.cuh"

namespace fusedkv {

namespace {

constexpr int kLanes = 8;  // per row
constexpr int kThreads = 128;
constexpr int kRows = kThreads / kLanes;  // per block

struct Params {
  AppendKVCacheParams append;
  // Whether rows can be moved 16 bytes at a time, or encoded 8 channels at a time.
  bool query_pieces, key_pieces, value_pieces;
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

template <typename T, typename Out>
__device__ __forceinline__ void rotate(T x0, T x1, float cos, float sin, Out* out0, Out* out1) {
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

// ---- codes --------------------------------------------------------------------------------------

constexpr int kCodes = 8;  // bytes of codes that a lane makes at once

// A row that is encoded. scale and center: of its head; center may be nullptr.
template <typename T>
struct EncodedRow {
  const T* from;
  const float *cos, *sin, *scale, *center;
  int rotated;
  bool interleaved;

  // Channel c after the rotation.
  __device__ __forceinline__ float channel(int c) const {
    if (c >= rotated) return float(widen(load(from + c)));
    const int half = rotated / 2, pair = interleaved ? c / 2 : c < half ? c : c - half;
    const int i0 = interleaved ? 2 * pair : pair, i1 = interleaved ? i0 + 1 : i0 + half;
    float y0, y1;
    rotate(load(from + i0), load(from + i1), load(cos + pair), load(sin + pair), &y0, &y1);
    return c == i0 ? y0 : y1;
  }

  // Channels c .. c + 7, none or all of which are rotated; of half-split pairs they have one side.
  __device__ __forceinline__ void channels(int c, float (&x)[kCodes]) const {
    load_channels(x, from + c, true);
    if (c >= rotated) return;
    if (interleaved) {
      float cosines[kCodes / 2], sines[kCodes / 2];
      load_table(cos + c / 2, cosines);
      load_table(sin + c / 2, sines);
#pragma unroll
      for (int i = 0; i < kCodes / 2; ++i)
        rotate(x[2 * i], x[2 * i + 1], cosines[i], sines[i], &x[2 * i], &x[2 * i + 1]);
      return;
    }
    const int half = rotated / 2;
    const bool first = c < half;
    float other[kCodes], cosines[kCodes], sines[kCodes];
    load_channels(other, from + (first ? c + half : c - half), true);
    load_table(cos + (first ? c : c - half), cosines);
    load_table(sin + (first ? c : c - half), sines);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      float y0, y1;
      rotate(first ? x[i] : other[i], first ? other[i] : x[i], cosines[i], sines[i], &y0, &y1);
      x[i] = first ? y0 : y1;
    }
  }

  template <CacheCode kCode>
  __device__ __forceinline__ uint32_t code(int c) const {
    const float x = channel(c);
    return encode<kCode>((center ? x - load(center + c) : x) / load(scale + c));
  }

  // The codes of channels c .. c + 7, four per word.
  template <CacheCode kCode>
  __device__ __forceinline__ uint2 codes(int c) const {
    float x[kCodes], scales[kCodes], centers[kCodes];
    channels(c, x);
    load_table(scale + c, scales);
    if (center) load_table(center + c, centers);
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      words[i / 4] |= encode<kCode>((center ? x[i] - centers[i] : x[i]) / scales[i]) << i % 4 * 8;
    return {words[0], words[1]};
  }
};

template <CacheCode kCode, typename T>
__device__ __forceinline__ void encode_row(uint8_t* to, const EncodedRow<T>& row, int D, bool pieces,
                                           int lane) {
  constexpr bool kHalves = kCode == CacheCode::i4;
  const int bytes = kHalves ? D / 2 : D;
  for (int at = lane * kCodes; pieces && at < bytes; at += kLanes * kCodes) {
    uint2 codes = row.template codes<kCode>(at);
    if (kHalves) {
      const uint2 high = row.template codes<kCode>(bytes + at);
      codes = {codes.x | high.x << 4, codes.y | high.y << 4};
    }
    store(reinterpret_cast<uint2*>(to + at), codes);
  }
  for (int at = lane; !pieces && at < bytes; at += kLanes) {
    const uint32_t high = kHalves ? row.template code<kCode>(bytes + at) : 0;
    store(to + at, uint8_t(row.template code<kCode>(at) | high << 4));
  }
}

// Codes that are there already.
__device__ __forceinline__ void copy_codes(uint8_t* to, const uint8_t* from, int bytes, bool pieces,
                                           int lane) {
  for (int at = lane * kCodes; pieces && at < bytes; at += kLanes * kCodes)
    store(reinterpret_cast<uint2*>(to + at), load(reinterpret_cast<const uint2*>(from + at)));
  for (int at = lane; !pieces && at < bytes; at += kLanes) store(to + at, load(from + at));
}

// Token s of sequence b for row `row`, slot `slot` of a cache of codes.
template <typename T>
__device__ __forceinline__ void write_codes(const AppendKVCacheParams& p, const AppendTensor& x, int64_t b,
                                            int64_t s, int64_t row, int64_t slot, int64_t head, int64_t pos,
                                            int rotated, bool pieces, int lane) {
  const int64_t from = b * x.src_stride_b + s * x.src_stride_s + head * x.src_stride_g;
  uint8_t* to =
      static_cast<uint8_t*>(x.dst) + row * x.dst_stride_b + slot * x.dst_stride_t + head * x.dst_stride_g;
  const int D = int(x.D);
  if (!x.scale) {
    const int bytes = int(cache_elements(x.code, D));
    return copy_codes(to, static_cast<const uint8_t*>(x.src) + from, bytes, pieces, lane);
  }
  const int64_t angles = pos * (rotated / 2);
  const EncodedRow<T> encoded = {
      static_cast<const T*>(x.src) + from,        p.cos + angles, p.sin + angles, x.scale + head * x.D,
      x.center ? x.center + head * x.D : nullptr, rotated,        p.interleaved};
  if (x.code == CacheCode::i8) return encode_row<CacheCode::i8>(to, encoded, D, pieces, lane);
  if (x.code == CacheCode::e4m3) return encode_row<CacheCode::e4m3>(to, encoded, D, pieces, lane);
  encode_row<CacheCode::i4>(to, encoded, D, pieces, lane);
}

// ---- the kernel ---------------------------------------------------------------------------------

// kCoded: a cache has codes.
template <typename T, bool kCoded>
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
  const AppendTensor* tensor = nullptr;
  const auto take = [&](const AppendTensor& x, bool in_pieces) {
    if (kCoded) tensor = &x;
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
  if (kCoded && tensor->code != CacheCode::raw)
    return write_codes<T>(p, *tensor, b, s, row, slot, head, pos, rotated, pieces, lane);
  const int64_t angles = pos * (rotated / 2);
  move_row(to, from, p.cos + angles, p.sin + angles, rotated, D, p.interleaved, pieces, lane);
}

bool aligned16(const void* x) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Whether `strides`, in elements of `size` bytes, are multiples of so many bytes.
bool strides_fit(int64_t bytes, int64_t size, std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides)
    if (stride * size % bytes) return false;
  return true;
}

// Whether the pairs of a rotation lie in whole groups of `channels`, and so do their cosines and sines.
bool pairs_fit(const AppendKVCacheParams& p, int channels) {
  return !p.cos || (aligned16(p.cos) && aligned16(p.sin) &&
                    (p.interleaved ? p.rotary_dim : p.rotary_dim / 2) % channels == 0);
}

// Whether codes are made or copied in groups of kCodes bytes, each of which starts at a multiple of kCodes.
bool codes_fit(const AppendTensor& x, const AppendKVCacheParams& p, bool rotates) {
  const int64_t size = x.scale ? size_of(p.dtype) : 1, bytes = x.scale ? 16 : kCodes;
  if (cache_elements(x.code, x.D) % kCodes || reinterpret_cast<uintptr_t>(x.dst) % kCodes) return false;
  if (!strides_fit(kCodes, 1, {x.dst_stride_b, x.dst_stride_t, x.dst_stride_g})) return false;
  if (!strides_fit(bytes, size, {x.src_stride_b, x.src_stride_s, x.src_stride_g})) return false;
  if (reinterpret_cast<uintptr_t>(x.src) % uintptr_t(bytes)) return false;
  return !x.scale || (aligned16(x.scale) && aligned16(x.center) && (!rotates || pairs_fit(p, kCodes)));
}

// Whether every piece of every row starts at a multiple of 16 bytes, and every pair lies in whole pieces.
template <typename T>
bool in_pieces(const AppendTensor& x, const AppendKVCacheParams& p, bool rotates) {
  if (x.code != CacheCode::raw) return codes_fit(x, p, rotates);
  constexpr int kVec = Piece<T>::kVec;
  return strides_fit(kVec, 1,
                     {x.src_stride_b, x.src_stride_s, x.src_stride_g, x.dst_stride_b, x.dst_stride_t,
                      x.dst_stride_g, x.D}) &&
         aligned16(x.src) && aligned16(x.dst) && (!rotates || pairs_fit(p, kVec));
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
    const bool coded = p.key.code != CacheCode::raw || p.value.code != CacheCode::raw;
    error = launch_overlapped(coded ? append_kvcache_kernel<T, true> : append_kvcache_kernel<T, false>,
                              dim3(unsigned(blocks)), dim3(kThreads), 0, stream, params);
  });
  return error;
}

}  // namespace fusedkv
