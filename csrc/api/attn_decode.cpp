// attn_with_kvcache on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "api/attn_decode.h"
#include "cpu/simd_targets.h"
#include "cpu/workspace.h"

namespace fusedkv::api {

namespace {

// Fewer elements of the caches than these are not worth waking another thread, which takes tens of
// microseconds. Then every thread has at least the grain.
constexpr int64_t kElementsToWake = 384 * 1024, kGrainElements = 64 * 1024;

// Contiguous bytes that a thread reads per token and source: a page of memory if possible, and so few that
// this block of tokens and the next one, of all sources, stay in L2.
constexpr int64_t kStretchBytes = 4096, kStretchBytesOfAllSources = 16384;

// Elements of the visible tokens of all sequences in the caches.
int64_t visible_elements(const AttnDecodeParams& p) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const TokenRange visible = visible_tokens(p, b);
    tokens += visible.end - visible.begin;
  }
  return tokens * p.G * (p.num_keys * p.D + p.num_values * p.Dv);
}

int64_t useful_threads(const AttnDecodeParams& p) {
  const int64_t elements = visible_elements(p);
  if (elements < kElementsToWake) return 1;
  return std::clamp<int64_t>(elements / kGrainElements, 1, torch::stable::get_num_threads());
}

// KV heads that a task processes together: adjacent heads up to kStretchBytes, or one if heads are not
// adjacent, and few enough for several tasks per thread. Heads are independent, so that the bits do not
// depend on it.
int64_t heads_per_task(const AttnDecodeParams& p, int64_t tasks_per_head, int64_t threads) {
  const CacheTensor& keys = p.keys[0];
  const int64_t elements = cache_elements(p.key_code, p.D);
  if (keys.stride_g > elements) return 1;
  constexpr int64_t kTasksPerThread = 4;
  const int64_t bytes = std::min(kStretchBytes, kStretchBytesOfAllSources / (p.num_keys + p.num_values));
  const int64_t stretch = std::max<int64_t>(bytes / (elements * size_of(p.key_code, p.dtype)), 1);
  const int64_t for_threads = tasks_per_head * p.G / (threads * kTasksPerThread);
  const int64_t most = std::min(stretch, std::max<int64_t>(for_threads, 1));
  return std::min(most, p.G);
}

void check_packed_queries(const AttnDecodeParams& p) {
  if (!p.cu_seqlens_q) return;
  check_value(p.cu_seqlens_q[0] == 0, "cu_seqlens_q[0] must be 0, got ", p.cu_seqlens_q[0]);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t count = queries_of(p, b).count;
    check_value(count >= 0 && count <= p.S, "cu_seqlens_q[", b + 1, "] - cu_seqlens_q[", b,
                "] must be from 0 to max_seqlen_q = ", p.S, ", got ", count);
  }
  check_value(p.cu_seqlens_q[p.B] == p.total_q, "cu_seqlens_q must end with ", p.total_q,
              ", the tokens of q, got ", p.cu_seqlens_q[p.B]);
}

AttnResults attend(const AttnArguments& x) {
  AttnDecodeParams p = attn_params(x, /*cuda=*/false);
  check_packed_queries(p);
  const CacheLayout layout =
      cache_layout(x.key_caches[0], "key_caches[0]", x.cache_seqlens, x.block_table, p.B, false);
  set_options(p, layout, x);
  set_scores(p, x, false);
  TokenScales scales;
  set_codes(p, x, false, &scales);
  if (x.workspace) caller_workspace(*x.workspace, 0, false);  // threads have their own
  bool all_written = true;                                    // by tasks: every sequence has one split
  int64_t partials = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    check_length(layout, b);
    const TokenRange visible = visible_tokens(p, b);
    check_pages(layout, b, visible.begin, visible.end);
    const int64_t splits = num_splits(p, b);
    all_written &= splits == 1;
    if (splits > 1) partials += splits * p.G * num_rows(p, b);
  }

  const int64_t offset_bytes = 2 * (p.B + 1) * int64_t(sizeof(int64_t));
  auto* shared = static_cast<char*>(
      cpu_workspace(Workspace::kCall, offset_bytes + partials * (p.Dv + 1) * int64_t(sizeof(float))));
  auto* task_offsets = reinterpret_cast<int64_t*>(shared);
  int64_t* partial_offsets = task_offsets + p.B + 1;
  task_offsets[0] = partial_offsets[0] = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t splits = num_splits(p, b);
    task_offsets[b + 1] = task_offsets[b] + splits * num_row_groups(p, b);
    partial_offsets[b + 1] = partial_offsets[b] + (splits > 1 ? splits * p.G * num_rows(p, b) : 0);
  }
  p.task_offsets = task_offsets;
  p.partial_offsets = partial_offsets;
  p.partial_out = reinterpret_cast<float*>(shared + offset_bytes);
  p.partial_lse = p.partial_out + partials * p.Dv;
  const AttnResults results = begin_results(p, x, false);

  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = useful_threads(p);
  p.task_heads = heads_per_task(p, task_offsets[p.B], threads);
  const int64_t tasks = task_offsets[p.B] * num_head_blocks(p);
  // Threads take the next task when they are free: sequences differ in length, and other processes use cores.
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    void* workspace = cpu_workspace(Workspace::kTask, attn_decode_workspace(p));
    const auto take = [&] {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      return task < tasks ? task : -1;
    };
    for (int64_t task = take(); task >= 0;) {
      const int64_t then = take();
      kernels.attn_decode(p, task, then, workspace);
      task = then;
    }
  };
  if (threads == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work);
  if (!all_written) {
    torch::stable::parallel_for(0, p.total_q * p.H, 64, [&](int64_t begin, int64_t end) {
      kernels.attn_decode_merge(p, begin, end);
    });
  }
  return results;
}

// The CPU splits on a fixed grid: it needs no schedule, and every result is batch-invariant.
Tensor attn_schedule(Tensor cache_seqlens, int64_t, int64_t, int64_t, int64_t, int64_t, bool) {
  return empty_tensor(cache_seqlens, {0}, dtype_code(cache_seqlens));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CPU, m) {
  m.impl("attn_schedule", TORCH_BOX(&attn_schedule));
  m.impl("attn_with_kvcache", TORCH_BOX(&attn_with_kvcache<attend>));
  m.impl("attn_with_kvcache_out", TORCH_BOX(&attn_with_kvcache_out<attend>));
}

}  // namespace fusedkv::api
