// The CPU kernels of one SIMD target as a table of functions, and the choice of the target at run time.
#pragma once

#include <cstdint>

namespace fusedkv {

struct AppendKVCacheParams;
struct AttnDecodeParams;
struct FuseKVParams;
struct MergeStatesParams;

// Every function but attn_decode computes [begin, end) of its parallel dimension: the caller owns the
// threads.
struct CpuKernels {
  const char* target;
  void (*fuse_kv_forward)(const FuseKVParams&, int64_t begin, int64_t end);   // tokens of B * T
  void (*fuse_kv_backward)(const FuseKVParams&, int64_t begin, int64_t end);  // chunks of kFuseChunkTokens
  void (*fuse_kv_reduce_weights)(const FuseKVParams&, int64_t begin,
                                 int64_t end);  // blocks of 8 channels of m * G * D
  // One task. next_task is the thread's next one (-1: none), whose beginning it prefetches.
  void (*attn_decode)(const AttnDecodeParams&, int64_t task, int64_t next_task, void* workspace);
  void (*attn_decode_merge)(const AttnDecodeParams&, int64_t begin, int64_t end);  // (query token, h)
  void (*append_kvcache)(const AppendKVCacheParams&, int64_t begin, int64_t end);  // tokens of B * S
  void (*merge_states)(const MergeStatesParams&, int64_t begin, int64_t end);      // rows of B * S * H
};

// The table in use: the best target of this CPU, or the one that FUSEDKV_CPU_LEVEL or set_simd_target names.
const CpuKernels& cpu_kernels();

// The targets of this build that this CPU supports, best first, "portable" last. Returns their number.
int simd_targets(const CpuKernels* const** tables);

// Returns false, and changes nothing, if the target is unknown or this CPU does not support it.
bool set_simd_target(const char* target);

}  // namespace fusedkv
