// The CPU kernels of one SIMD level as a table of functions, and the choice of the level at run time.
#pragma once

#include <cstdint>

namespace fusedkv {

struct AppendKVCacheParams;
struct AttnDecodeParams;
struct FuseKVParams;

// Every function but attn_decode works on [begin, end) of its parallel dimension, so that the caller owns the
// threads.
struct CpuKernels {
  const char* level;
  void (*fuse_kv_forward)(const FuseKVParams&, int64_t begin, int64_t end);   // tokens of B * T
  void (*fuse_kv_backward)(const FuseKVParams&, int64_t begin, int64_t end);  // chunks of kFuseChunkTokens
  void (*fuse_kv_reduce_weights)(const FuseKVParams&, int64_t begin,
                                 int64_t end);  // blocks of 8 channels of m * G * D
  // One task; next_task is the one that this thread will do then (-1: none), whose beginning it asks for
  // ahead.
  void (*attn_decode)(const AttnDecodeParams&, int64_t task, int64_t next_task, void* workspace);
  void (*attn_decode_merge)(const AttnDecodeParams&, int64_t begin, int64_t end);  // (b, g, row)
  void (*append_kvcache)(const AppendKVCacheParams&, int64_t begin, int64_t end);  // tokens of B * S
};

// The table in use: the best level that this CPU runs, lowered by FUSEDKV_CPU_LEVEL or set_cpu_level.
const CpuKernels& cpu_kernels();

// Levels that this build has and this CPU runs, best first, "portable" last.
int cpu_levels(const CpuKernels* const** levels);

// Returns false (and changes nothing) when the level is unknown or this CPU does not run it.
bool set_cpu_level(const char* level);

}  // namespace fusedkv
