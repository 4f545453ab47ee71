// out[b,t,g,d] = sum_j w[j,g,d] * x_j[b,t,g,d]
//
// Memory-bound: (m + 1) elements move per output element and m multiply-adds are done, so the shape of the
// kernel is about loads in flight. A thread owns one 16-byte piece of the channels (g, d .. d + kVec - 1) and
// walks over tokens: its weights stay in registers, a warp reads 512 contiguous bytes of a token, and kUnroll
// tokens times m sources are loaded before the first one is used. fp32 sums (fp64 for fp64), one rounding.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/fuse_kv.h"

namespace fusedkv {

namespace {

constexpr int kUnroll = 4;
constexpr int kPiecesPerBlock = 32;  // x: one warp side by side over the channels
constexpr int kTokensPerBlock = 8;   // y

template <typename T>
struct Element;

template <>
struct Element<double> {
  using Device = double;
  using Acc = double;
  static __device__ double widen(double x) { return x; }
  static __device__ double narrow(double x) { return x; }
};

template <>
struct Element<float> {
  using Device = float;
  using Acc = float;
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
};

template <>
struct Element<bf16> {
  using Device = __nv_bfloat16;
  using Acc = float;
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Element<f16> {
  using Device = __half;
  using Acc = float;
  static __device__ float widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
};

// 16 bytes of elements, loaded and stored as one.
template <typename T>
union Piece {
  static constexpr int kVec = 16 / sizeof(T);
  uint4 raw;
  typename Element<T>::Device element[kVec];
};

// kSources 1..4: unrolled, weights in registers. 0: any number of sources, weights re-read (they stay in L1).
template <typename T, int kSources>
__global__ void __launch_bounds__(kPiecesPerBlock* kTokensPerBlock)
    fuse_kv_forward_kernel(const __grid_constant__ FuseKVParams p) {
  using E = Element<T>;
  using Acc = typename E::Acc;
  constexpr int kVec = Piece<T>::kVec;
  constexpr int kHeld = kSources > 0 ? kSources : 1;
  const int64_t row = p.G * p.D;
  const int64_t channel = (int64_t(blockIdx.y) * kPiecesPerBlock + threadIdx.x) * kVec;
  if (channel >= row) return;
  const int64_t g = channel / p.D, d = channel % p.D;
  const Acc* weights = static_cast<const Acc*>(p.weights) + channel;

  Acc held[kHeld][kVec];
  if constexpr (kSources > 0) {
#pragma unroll
    for (int j = 0; j < kSources; ++j)
#pragma unroll
      for (int i = 0; i < kVec; ++i) held[j][i] = weights[j * row + i];
  }
  const auto load = [&](int j, int64_t token) {
    const TokenTensor& x = p.sources[j];
    const int64_t b = token / p.T, t = token - b * p.T;
    const T* from = static_cast<const T*>(x.data) + b * x.stride_b + t * x.stride_t + g * x.stride_g + d;
    Piece<T> piece;
    piece.raw = __ldg(reinterpret_cast<const uint4*>(from));
    return piece;
  };

  const int64_t tokens = p.B * p.T;
  const int64_t stride = int64_t(gridDim.x) * kTokensPerBlock;
  for (int64_t first = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.y; first < tokens;
       first += stride * kUnroll) {
    Acc sum[kUnroll][kVec] = {};
    if constexpr (kSources > 0) {
      Piece<T> x[kUnroll][kHeld];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; j < kSources; ++j)
          if (first + u * stride < tokens) x[u][j] = load(j, first + u * stride);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; j < kSources; ++j)
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[u][i] += held[j][i] * E::widen(x[u][j].element[i]);
    } else {
      for (int j = 0; j < p.m; ++j) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (first + u * stride >= tokens) continue;
          const Piece<T> x = load(j, first + u * stride);
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[u][i] += weights[j * row + i] * E::widen(x.element[i]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * stride >= tokens) continue;
      Piece<T> out;
#pragma unroll
      for (int i = 0; i < kVec; ++i) out.element[i] = E::narrow(sum[u][i]);
      *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + (first + u * stride) * row + channel) = out.raw;
    }
  }
}

template <typename T>
cudaError_t launch(const FuseKVParams& p, cudaStream_t stream) {
  const int64_t tokens = p.B * p.T, pieces = p.G * p.D / Piece<T>::kVec;
  if (tokens == 0 || pieces == 0) return cudaSuccess;
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return error;
  // Enough blocks for 8 per SM over both grid dims, no more than there are tokens.
  const int64_t columns = (pieces + kPiecesPerBlock - 1) / kPiecesPerBlock;
  const int64_t needed = (tokens + kTokensPerBlock * kUnroll - 1) / (kTokensPerBlock * kUnroll);
  const int64_t wanted = (int64_t(processors) * 8 + columns - 1) / columns;
  const dim3 grid(unsigned(needed < wanted ? needed : wanted), unsigned(columns));
  const dim3 block(kPiecesPerBlock, kTokensPerBlock);
  switch (p.m) {
    case 1:
      fuse_kv_forward_kernel<T, 1><<<grid, block, 0, stream>>>(p);
      break;
    case 2:
      fuse_kv_forward_kernel<T, 2><<<grid, block, 0, stream>>>(p);
      break;
    case 3:
      fuse_kv_forward_kernel<T, 3><<<grid, block, 0, stream>>>(p);
      break;
    case 4:
      fuse_kv_forward_kernel<T, 4><<<grid, block, 0, stream>>>(p);
      break;
    default:
      fuse_kv_forward_kernel<T, 0><<<grid, block, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

int fuse_kv_forward_cuda(const FuseKVParams& params, void* stream) {
  cudaError_t error = cudaSuccess;
  dispatch_dtype(params.dtype, [&](auto tag) {
    error = launch<typename decltype(tag)::type>(params, static_cast<cudaStream_t>(stream));
  });
  return int(error);
}

}  // namespace fusedkv
