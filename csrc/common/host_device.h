// Marks functions that host code and kernels share.
#pragma once

#if defined(__CUDACC__)
#define FUSEDKV_HOST_DEVICE __host__ __device__ __forceinline__
#else
// static: sources of a SIMD target include such functions too (cpu/simd.h).
#define FUSEDKV_HOST_DEVICE static inline
#endif
