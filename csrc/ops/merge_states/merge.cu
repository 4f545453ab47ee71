// lse = top + log(sum_i e_i),  out = sum_i (e_i / sum_j e_j) out_i,  e_i = exp(lse_i - top),  top = max_i
// lse_i
//
// A thread owns 8 channels of a query row and computes the shares of the states by itself. Sums are fp32. A
// state without keys has lse_i = -inf, and its out_i is not read. Without any there are 0 and -inf. Products
// are rounded before they are added: two states in either order give the same bits.

#include "ops/merge_states/params.h"

#include "cuda/elements.cuh"

namespace fusedkv {

namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 8;

__device__ __forceinline__ float no_keys() {
  return __uint_as_float(0xff800000u);
}

template <typename T>
__device__ __forceinline__ void store_channels(T* to, const float (&x)[kChannels]) {
#pragma unroll
  for (int i = 0; i < kChannels; i += Piece<T>::kVec) {
    Piece<T> piece;
#pragma unroll
    for (int k = 0; k < Piece<T>::kVec; ++k) narrow(x[i + k], &piece.element[k]);
    store(reinterpret_cast<uint4*>(to + i), piece.raw);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_states_kernel(const __grid_constant__ MergeStatesParams p) {
  const uint32_t pieces = uint32_t(p.D / kChannels), H = uint32_t(p.H), S = uint32_t(p.S);
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t row = index / pieces, token = row / H;
  if (int64_t(row) >= p.B * p.S * p.H) return;
  const int64_t h = row - token * H, b = token / S, s = token - b * S;
  const int64_t d = int64_t(index - row * pieces) * kChannels;
  const auto lse_of = [&](const AttnState& state) {
    return load(state.lse + b * state.lse_stride_b + h * state.lse_stride_h + s * state.lse_stride_s);
  };

  float top = no_keys(), sum = 0.f;
  for (int i = 0; i < p.n; ++i) {
    const float lse = lse_of(p.states[i]);
    top = lse > top ? lse : top;
  }
  const float base = top == no_keys() ? 0.f : top;
  for (int i = 0; i < p.n; ++i) sum += expf(lse_of(p.states[i]) - base);
  float out[kChannels] = {};
  bool first = true;
  for (int i = 0; i < p.n; ++i) {
    const AttnState& state = p.states[i];
    const float e = expf(lse_of(state) - base);
    if (e == 0.f) continue;
    const T* from = static_cast<const T*>(state.out) + b * state.out_stride_b + s * state.out_stride_s +
                    h * state.out_stride_h + d;
    const float share = e / sum;
    float x[kChannels];
    load_channels(x, from, reinterpret_cast<uintptr_t>(from) % 16 == 0);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const float product = __fmul_rn(share, x[k]);
      out[k] = first ? product : __fadd_rn(out[k], product);
    }
    first = false;
  }
  store_channels(static_cast<T*>(p.out) + int64_t(row) * p.D + d, out);
  if (d == 0) store(p.lse + (b * p.H + h) * p.S + s, sum == 0.f ? no_keys() : base + logf(sum));
}

}  // namespace

int merge_states_cuda(const MergeStatesParams& p, void* stream) {
  const int64_t threads = p.B * p.S * p.H * (p.D / kChannels);
  if (threads == 0) return 0;
  const dim3 grid(unsigned((threads + kThreads - 1) / kThreads));
  const auto run = [&](auto kernel) { return launch(kernel, grid, dim3(kThreads), 0, stream, p); };
  if (p.dtype == DType::f32) return run(merge_states_kernel<float>);
  if (p.dtype == DType::bf16) return run(merge_states_kernel<bf16>);
  return run(merge_states_kernel<f16>);
}

}  // namespace fusedkv
