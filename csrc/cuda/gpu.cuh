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

// The error that a call returned. The runtime keeps it too, and the next launch would report it again: it is
// cleared.
inline int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return int(error);
}

// What a kernel may use of the current device.
struct DeviceLimits {
  int device;
  int sm_count;
  int shared_per_block;  // bytes, with the opt-in beyond 48 KiB
  int major;             // of the compute capability
};

inline int device_limits(DeviceLimits* limits) {
  if (int error = taken(cudaGetDevice(&limits->device))) return error;
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    return taken(cudaDeviceGetAttribute(value, attribute, limits->device));
  };
  if (int error = get(&limits->sm_count, cudaDevAttrMultiProcessorCount)) return error;
  if (int error = get(&limits->major, cudaDevAttrComputeCapabilityMajor)) return error;
  return get(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Permits a kernel all shared memory of the current device, and prefers the largest carveout for it. Once per
// kernel and device.
template <typename Params>
int allow_shared(void (*kernel)(Params), const DeviceLimits& limits) {
  if (int error = taken(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block)))
    return error;
  return taken(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
}

// Resident blocks of this kernel per SM.
template <typename Params>
int blocks_per_sm(int* blocks, void (*kernel)(Params), int threads, size_t shared_bytes) {
  return taken(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes));
}

// kernel<<<grid, block, shared_bytes, stream>>>(params). `stream` is a cudaStream_t. Returns a cudaError_t, 0
// for success.
template <typename Params>
int launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Params& params) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return int(cudaGetLastError());
}

// The same for a kernel that begins with ptx::grid_dependency_wait(): since sm_90 its blocks may be placed
// while the kernel before it still runs (programmatic dependent launch).
template <typename Params>
int launch_overlapped(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                      const Params& params) {
  DeviceLimits limits;
  if (int error = device_limits(&limits)) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = limits.major >= 9 ? 1 : 0;
  return taken(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace fusedkv

#endif
