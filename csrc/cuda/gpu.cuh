// What every .cu file includes: CUDA, or the executor that runs the same source on the host (csrc/simt), and
// what differs between the two.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FUSEDKV_SIMT)

// The executor defines the same names: CUDA's keywords, vector types and built-ins that the kernels use, the
// functions of ptx.cuh, and those of the #else branch below.
#include "simt/device.h"

#else

#include <cuda_runtime.h>

#include "cuda/ptx.cuh"

namespace fusedkv {

// Address of the block's dynamic shared memory, the only shared memory that kernels use.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared_memory));
}

// Every access of a kernel to global memory: the executor checks the address.
template <typename T>
__device__ __forceinline__ T load(const T* from) {
  return *from;
}

template <typename T>
__device__ __forceinline__ void store(T* to, const T& x) {
  *to = x;
}

// What a kernel may use of the current device.
struct DeviceLimits {
  int sm_count;
  int shared_per_block;  // bytes, with the opt-in beyond 48 KiB
};

inline int device_limits(DeviceLimits* limits) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return int(error);
  if (cudaError_t error = cudaDeviceGetAttribute(&limits->sm_count, cudaDevAttrMultiProcessorCount, device))
    return int(error);
  return int(
      cudaDeviceGetAttribute(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Permits a kernel more shared memory per block than the default, and prefers the largest carveout for it.
template <typename Params>
int allow_shared(void (*kernel)(Params), size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return 0;
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)))
    return int(error);
  return int(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
}

// Resident blocks of this kernel per SM.
template <typename Params>
int blocks_per_sm(int* blocks, void (*kernel)(Params), int threads, size_t shared_bytes) {
  if (int error = allow_shared(kernel, shared_bytes)) return error;
  return int(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes));
}

// kernel<<<grid, block, shared_bytes, stream>>>(params). `stream` is a cudaStream_t. Returns a cudaError_t, 0
// for success.
template <typename Params>
int launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Params& params) {
  if (int error = allow_shared(kernel, shared_bytes)) return error;
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return int(cudaGetLastError());
}

}  // namespace fusedkv

#endif
