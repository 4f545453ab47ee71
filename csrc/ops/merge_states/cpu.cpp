// lse = top + log(sum_i e_i),  out = sum_i (e_i / sum_j e_j) out_i,  e_i = exp(lse_i - top),  top = max_i
// lse_i
//
// In fp32. A state without keys has lse_i = -inf, and its out_i is not read. Without any there are 0 and
// -inf. Products are rounded before they are added: two states in either order give the same bits.

#include "ops/merge_states/params.h"

#include "cpu/simd.h"

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

namespace {

constexpr float kNoKeys = -__builtin_inff();

template <typename T>
void merge_row(const MergeStatesParams& p, int64_t b, int64_t s, int64_t h) {
  float share[kMaxSources];
  float top = kNoKeys, sum = 0.f;
  for (int i = 0; i < p.n; ++i) {
    const AttnState& state = p.states[i];
    share[i] = state.lse[b * state.lse_stride_b + h * state.lse_stride_h + s * state.lse_stride_s];
    top = share[i] > top ? share[i] : top;
  }
  const float base = top == kNoKeys ? 0.f : top;
  for (int i = 0; i < p.n; ++i) sum += share[i] = __builtin_expf(share[i] - base);
  const int64_t row = (b * p.S + s) * p.H + h;
  float out[kMaxHeadDim] = {};
  bool first = true;
  for (int i = 0; i < p.n; ++i) {
    const AttnState& state = p.states[i];
    if (share[i] == 0.f) continue;
    const float weight = share[i] / sum;
    const T* from =
        (const T*)state.out + b * state.out_stride_b + s * state.out_stride_s + h * state.out_stride_h;
    int64_t d = 0;
    for (; d + kLanes <= p.D; d += kLanes) {
      const Vec x = mul(set1(weight), load(from + d));
      store(out + d, first ? x : add(load(out + d), x));
    }
    for (; d < p.D; ++d) {
      const float x = weight * widen(from[d]);
      out[d] = first ? x : out[d] + x;
    }
    first = false;
  }
  T* to = (T*)p.out + row * p.D;
  int64_t d = 0;
  for (; d + kLanes <= p.D; d += kLanes) store(to + d, load(out + d));
  for (; d < p.D; ++d) narrow(out[d], to + d);
  p.lse[(b * p.H + h) * p.S + s] = sum == 0.f ? kNoKeys : base + __builtin_logf(sum);
}

template <typename T>
void merge(const MergeStatesParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) merge_row<T>(p, row / p.H / p.S, row / p.H % p.S, row % p.H);
}

}  // namespace

void merge_states(const MergeStatesParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32) return merge<float>(p, begin, end);
  if (p.dtype == DType::bf16) return merge<bf16>(p, begin, end);
  merge<f16>(p, begin, end);
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
