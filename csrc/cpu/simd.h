// A float vector of the widest width that this translation unit is compiled for.
//
// Every ops/*/cpu.cpp is compiled once per SIMD target (CMakeLists.txt) into a namespace with the target's
// name; simd_targets.cpp selects one at run time. Hence a rule for these headers and their users. They use no
// inline function of the standard library, and no other function with external linkage outside the target's
// namespace. Otherwise the linker could keep an AVX-512 copy for every CPU.
//
// The operations are those that the kernels use: loads that widen to fp32, stores that round once (to nearest
// even), fma, max, exp2, and the sums of kLanes vectors at once.
#pragma once

#ifndef FUSEDKV_SIMD_TARGET
#define FUSEDKV_SIMD_TARGET portable
#endif

#if defined(__AVX512F__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/portable.h"
#endif

#if !defined(__AVX512F__)
namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// D is a multiple of 8, so that only 16 lanes need partial loads. With these the kernels have one source.
template <typename T>
static inline Vec load(const T* p, int) {
  return load(p);
}
template <typename T>
static inline void store(T* p, Vec x, int) {
  store(p, x);
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
#endif
