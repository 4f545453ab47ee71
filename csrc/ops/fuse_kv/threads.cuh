// What the forward and the backward kernel of fuse_kv share: the mapping of threads to channels and tokens.
#pragma once

#include "cuda/elements.cuh"
#include "ops/fuse_kv/params.h"

namespace fusedkv {

constexpr int kFuseThreads = 256;

// 16-byte pieces of the channels per block, at most `most`. Blocks get equal numbers as far as possible, so
// that few threads of the last block are idle.
inline int columns_per_block(int64_t pieces, int64_t most) {
  const int64_t blocks = (pieces + most - 1) / most;
  return int((pieces + blocks - 1) / blocks);
}

// The place of a thread in its block: `columns` threads per row cover channels, rows cover tokens.
template <typename T>
struct ThreadPlace {
  int column, row, rows;
  int64_t channel;  // the first of the thread's Piece<T>
  int g;
  int64_t d;
  bool active;

  __device__ __forceinline__ ThreadPlace(const FuseKVParams& p, int columns) {
    column = int(threadIdx.x) % columns;
    row = int(threadIdx.x) / columns;
    rows = kFuseThreads / columns;
    channel = (int64_t(blockIdx.y) * columns + column) * Piece<T>::kVec;
    g = int(channel / p.D);
    d = channel - g * p.D;
    active = row < rows && channel < p.G * p.D;
  }
};

// Tokens (b, t), numbered b * T + t, at a fixed distance. It divides at the start, not in each step.
struct TokenWalk {
  int64_t token, step;
  int b, t, step_b, step_t, T;

  __device__ __forceinline__ TokenWalk(int64_t first, int64_t distance, const FuseKVParams& p)
      : token(first), step(distance), T(int(p.T)) {
    b = int(first / p.T);
    t = int(first - b * p.T);
    step_b = int(distance / p.T);
    step_t = int(distance - step_b * p.T);
  }

  __device__ __forceinline__ void advance() {
    token += step;
    b += step_b;
    t += step_t;
    if (t >= T) {
      t -= T;
      ++b;
    }
  }
};

template <typename T>
__device__ __forceinline__ Piece<T> read_once(const T* from) {
  Piece<T> piece;
  piece.raw = ptx::ld_global_stream_b128(from);
  return piece;
}

template <typename T>
__device__ __forceinline__ Piece<T> read(const T* from) {
  Piece<T> piece;
  piece.raw = load(reinterpret_cast<const uint4*>(from));
  return piece;
}

template <typename T>
__device__ __forceinline__ void write(T* to, const Piece<T>& piece) {
  store(reinterpret_cast<uint4*>(to), piece.raw);
}

// N fp32 or fp64 numbers, a multiple of 16 bytes.
template <typename Acc, int N>
__device__ __forceinline__ void read_sums(const Acc* from, Acc (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += Piece<Acc>::kVec) {
    const Piece<Acc> piece = read(from + i);
#pragma unroll
    for (int k = 0; k < Piece<Acc>::kVec; ++k) sums[i + k] = piece.element[k];
  }
}

template <typename Acc, int N>
__device__ __forceinline__ void write_sums(Acc* to, const Acc (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += Piece<Acc>::kVec) {
    Piece<Acc> piece;
#pragma unroll
    for (int k = 0; k < Piece<Acc>::kVec; ++k) piece.element[k] = sums[i + k];
    write(to + i, piece);
  }
}

}  // namespace fusedkv
