// A float vector of the widest width that this translation unit is compiled for.
//
// Every ops/*/cpu.cpp is compiled once per SIMD level (CMakeLists.txt) into a namespace of that level's name;
// simd_targets.cpp picks one at run time. Hence the rule of these headers and of their users: no inline
// function of the standard library and nothing outside the level's namespace that is compiled with the
// level's flags, or the linker could keep an AVX-512 copy for everybody.
//
// Only what the kernels use is there: loads that widen to fp32, stores that round once (to nearest even),
// fma, max, exp2, and the sum of each of kLanes vectors at once.
#pragma once

#ifndef FUSEDKV_LEVEL
#define FUSEDKV_LEVEL portable
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
namespace FUSEDKV_LEVEL {

// D is a multiple of 8 and so are 8 lanes: a part load only happens with 16 lanes. These keep the kernels one
// source.
template <typename T>
static inline Vec load(const T* p, int) {
  return load(p);
}
template <typename T>
static inline void store(T* p, Vec x, int) {
  store(p, x);
}

}  // namespace FUSEDKV_LEVEL
}  // namespace fusedkv
#endif
