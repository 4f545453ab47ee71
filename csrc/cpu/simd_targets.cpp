// Selects the SIMD target by cpuid, once. Compiled for the baseline CPU.

#include "cpu/simd_targets.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(FUSEDKV_X86_TARGETS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedkv {

#if defined(FUSEDKV_X86_TARGETS)
namespace amx {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
#endif
namespace portable {
extern const CpuKernels kernels;
}

namespace {

#if defined(FUSEDKV_X86_TARGETS)

// Whether this CPU has AMX and the system permits it. The tile registers are large, so that a process has to
// request them from Linux.
bool may_use_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // cpuid leaf 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kAmxBf16) && (d & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

struct Targets {
  const CpuKernels* tables[5];
  int count = 0;

  Targets() {
#if defined(FUSEDKV_X86_TARGETS)
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    if (has_bf16 && may_use_amx()) tables[count++] = &amx::kernels;
    if (has_bf16) tables[count++] = &avx512_bf16::kernels;
    if (has_avx512) tables[count++] = &avx512::kernels;
    if (has_avx2) tables[count++] = &avx2::kernels;
#endif
    tables[count++] = &portable::kernels;
  }

  const CpuKernels* find(const char* target) const {
    for (int i = 0; i < count; ++i)
      if (std::strcmp(tables[i]->target, target) == 0) return tables[i];
    return nullptr;
  }
};

const Targets& targets() {
  static const Targets instance;
  return instance;
}

std::atomic<const CpuKernels*>& current() {
  static std::atomic<const CpuKernels*> table = [] {
    const char* wanted = std::getenv("FUSEDKV_CPU_LEVEL");
    const CpuKernels* found = wanted ? targets().find(wanted) : nullptr;
    return found ? found : targets().tables[0];
  }();
  return table;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  return *current().load(std::memory_order_relaxed);
}

int simd_targets(const CpuKernels* const** tables) {
  *tables = targets().tables;
  return targets().count;
}

bool set_simd_target(const char* target) {
  const CpuKernels* table = targets().find(target);
  if (table) current().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace fusedkv
