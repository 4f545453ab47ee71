// Counts the instructions of one cached attention on the CPU: a measure of the kernels that neither the
// machine's load nor its clock changes. Built by `make test`, read by python_tests/instruction_counts.py.
//
//   count_instructions [TOKENS]    one JSON object; exit status 77 and a reason where it cannot count
//
// It sets the processor's trap flag around the call: a SIGTRAP after every instruction, also after those that
// emulators of processors (valgrind) do not know, without any permission. A step takes microseconds, so the
// problem is small: what is counted is the loop over blocks of tokens, its prologue included. Only
// instructions of this program count, not those of memset or log2f in the system's libraries, which are of
// another version on every machine.

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/simd_targets.h"
#include "ops/attn_decode/params.h"

#if defined(__linux__) && defined(__x86_64__)
#include <ucontext.h>

extern "C" char __executable_start, etext;  // from the linker: where this program's code lies

namespace {

using namespace fusedkv;

volatile int64_t counted;

void on_step(int, siginfo_t*, void* context) {
  const auto at = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  if (at >= uintptr_t(&__executable_start) && at < uintptr_t(&etext)) counted = counted + 1;
}

// The pushes have to stay clear of the 128 bytes below the stack pointer that the compiler may use.
inline void trap_flag(bool on) {
  if (on)
    asm volatile("sub $128, %%rsp; pushfq; orl $0x100, (%%rsp); popfq; add $128, %%rsp" ::: "memory", "cc");
  else
    asm volatile("sub $128, %%rsp; pushfq; andl $~0x100, (%%rsp); popfq; add $128, %%rsp" ::: "memory", "cc");
}

template <typename Fn>
int64_t count(const Fn& fn) {
  counted = 0;
  trap_flag(true);
  fn();
  trap_flag(false);
  return counted;
}

// Two instructions 1000 times and one before them, plus those of turning the flag on and off.
bool can_count() {
  const int64_t steps = count([] {
    asm volatile("mov $1000, %%ecx; 1: sub $1, %%ecx; jnz 1b" ::: "ecx", "cc");
  });
  return steps >= 2001 && steps < 2020;
}

struct Case {
  const char* name;
  DType dtype;
  int64_t group;      // query heads per KV head
  int64_t page_size;  // 0: contiguous
  // Counted for these targets: not for those that run the same source as another, nor where it takes long.
  std::vector<std::string> targets;
};

const Case kCases[] = {
    {"bf16, 1 query head", DType::bf16, 1, 0, {"amx", "avx512_bf16", "avx512", "avx2", "portable"}},
    {"bf16, 4 query heads", DType::bf16, 4, 0, {"amx", "avx512_bf16", "avx512", "avx2"}},
    {"bf16, 4 query heads, pages of 16", DType::bf16, 4, 16, {"amx"}},
    {"fp32, 1 query head", DType::f32, 1, 0, {"avx512", "avx2"}},
    {"fp32, 4 query heads", DType::f32, 4, 0, {"avx512"}},
};

constexpr int64_t kHeads = 1, kDim = 128, kSources = 2;

int64_t element_bytes(const Case& c) {
  return c.dtype == DType::f32 ? 4 : 2;
}

// Lines of 64 bytes in the caches that the call reads.
int64_t lines(const Case& c, int64_t tokens) {
  return 2 * kSources * tokens * kHeads * kDim * element_bytes(c) / 64;
}

// The same numbers in [-1, 1) everywhere: how often the running maximum grows depends on them.
class Numbers {
 public:
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return float(int32_t(state_)) * 0x1p-31f;
  }

  std::vector<float> floats(int64_t n) {
    std::vector<float> x(n);
    for (float& value : x) value = next();
    return x;
  }

  // n elements of the case's type; bf16 is the upper half of a float.
  std::vector<uint16_t> elements(int64_t n, const Case& c) {
    const std::vector<float> x = floats(n);
    const auto* halves = reinterpret_cast<const uint16_t*>(x.data());
    if (c.dtype == DType::f32) return {halves, halves + 2 * n};
    std::vector<uint16_t> result(n);
    for (int64_t i = 0; i < n; ++i) result[i] = halves[2 * i + 1];
    return result;
  }

 private:
  uint32_t state_ = 1;
};

int64_t count_decode(const CpuKernels& kernels, const Case& c, int64_t tokens) {
  Numbers numbers;
  AttnDecodeParams p{};
  p.dtype = c.dtype;
  p.B = p.S = p.total_q = 1;
  p.G = kHeads, p.H = kHeads * c.group;
  p.D = p.Dv = kDim;
  p.num_keys = p.num_values = kSources;
  std::vector<std::vector<uint16_t>> caches;
  for (int i = 0; i < 2 * kSources; ++i) {
    caches.push_back(numbers.elements(tokens * kHeads * kDim, c));
    CacheTensor& cache = i % 2 ? p.values[i / 2] : p.keys[i / 2];
    const int64_t slots = c.page_size ? c.page_size : tokens;
    cache = {caches.back().data(), slots * kHeads * kDim, kHeads * kDim, kDim};
  }
  std::vector<int32_t> table;
  if (c.page_size) {
    const int64_t pages = (tokens + c.page_size - 1) / c.page_size;
    for (int64_t i = 0; i < pages; ++i) table.push_back(int32_t(pages - 1 - i));
    p.block_table = table.data();
    p.block_table_stride = pages;
    p.page_size = c.page_size;
  }
  const std::vector<uint16_t> q = numbers.elements(p.H * kDim, c);
  p.q = q.data();
  p.q_stride_b = p.q_stride_s = p.H * kDim;
  p.q_stride_h = kDim;
  const std::vector<float> key_weights = numbers.floats(kSources * kHeads * kDim),
                           value_weights = numbers.floats(kSources * kHeads * kDim);
  p.key_weights = key_weights.data();
  p.value_weights = value_weights.data();
  const int32_t length = int32_t(tokens);
  p.seq_lens = &length;
  p.scale = 1.f / std::sqrt(float(kDim));
  p.window_left = p.window_right = -1;
  p.task_heads = kHeads;
  const int64_t splits = num_splits(p, 0), task_offsets[] = {0, splits * num_row_groups(p, 0)};
  const int64_t partial_offsets[] = {0, splits * p.H};
  p.task_offsets = task_offsets;
  p.partial_offsets = partial_offsets;
  std::vector<float> partial_out(splits * p.H * kDim), partial_lse(splits * p.H), lse(p.H), out(p.H * kDim);
  p.partial_out = partial_out.data();
  p.partial_lse = partial_lse.data();
  p.out = out.data();
  p.lse = lse.data();
  const size_t workspace_bytes = (size_t(attn_decode_workspace(p)) + 63) / 64 * 64;
  void* workspace = std::aligned_alloc(64, workspace_bytes);
  const auto call = [&] {
    const int64_t tasks = task_offsets[1] * num_head_blocks(p);
    for (int64_t task = 0; task < tasks; ++task)
      kernels.attn_decode(p, task, task + 1 < tasks ? task + 1 : -1, workspace);
    kernels.attn_decode_merge(p, 0, p.H);
  };
  call();  // the first call finds functions of other libraries
  const int64_t steps = count(call);
  std::free(workspace);
  return steps;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t tokens = argc > 1 ? std::atoll(argv[1]) : 64;
  if (tokens < 1 || tokens % 16) {
    std::fprintf(stderr, "usage: count_instructions [TOKENS], a multiple of 16\n");
    return 2;
  }
  struct sigaction action = {};
  action.sa_sigaction = on_step;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &action, nullptr);
  if (!can_count()) {
    std::printf("this system does not stop after single instructions\n");
    return 77;
  }
  const CpuKernels* const* tables;
  const int num_targets = simd_targets(&tables);
  std::printf("{\n  \"compiler\": \"%s\",\n  \"tokens\": %lld,\n  \"lines\": {", FUSEDKV_COMPILER,
              (long long)tokens);
  const char* comma = "";
  for (const Case& c : kCases) {
    std::printf("%s\n    \"%s\": %lld", comma, c.name, (long long)lines(c, tokens));
    comma = ",";
  }
  std::printf("\n  },\n  \"instructions\": {");
  for (int i = 0; i < num_targets; ++i) {
    std::printf("%s\n    \"%s\": {", i ? "," : "", tables[i]->target);
    comma = "";
    for (const Case& c : kCases) {
      if (std::count(c.targets.begin(), c.targets.end(), tables[i]->target) == 0) continue;
      std::printf("%s\n      \"%s\": %lld", comma, c.name, (long long)count_decode(*tables[i], c, tokens));
      comma = ",";
    }
    std::printf("\n    }");
  }
  std::printf("\n  }\n}\n");
}

#else

int main() {
  std::printf("instructions are counted on Linux on x86-64 only\n");
  return 77;
}

#endif
