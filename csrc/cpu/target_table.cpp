// The functions of one SIMD target. This file is compiled once per target, like the kernels it names.

#include "cpu/simd_targets.h"

#ifndef FUSEDKV_SIMD_TARGET
#define FUSEDKV_SIMD_TARGET portable
#endif
#define FUSEDKV_STRINGIFY_(x) #x
#define FUSEDKV_STRINGIFY(x) FUSEDKV_STRINGIFY_(x)

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

void fuse_kv_forward(const FuseKVParams&, int64_t, int64_t);
void fuse_kv_backward(const FuseKVParams&, int64_t, int64_t);
void fuse_kv_reduce_weights(const FuseKVParams&, int64_t, int64_t);
void attn_decode(const AttnDecodeParams&, int64_t, int64_t, void*);
void attn_decode_merge(const AttnDecodeParams&, int64_t, int64_t);
void append_kvcache(const AppendKVCacheParams&, int64_t, int64_t);
void merge_states(const MergeStatesParams&, int64_t, int64_t);

extern const CpuKernels kernels;
const CpuKernels kernels = {
    FUSEDKV_STRINGIFY(FUSEDKV_SIMD_TARGET),
    fuse_kv_forward,
    fuse_kv_backward,
    fuse_kv_reduce_weights,
    attn_decode,
    attn_decode_merge,
    append_kvcache,
    merge_states,
};

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
