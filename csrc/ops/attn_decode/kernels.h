// The decode kernels by their template arguments, for launch.cu.
#pragma once

#include "ops/attn_decode/cuda_params.h"

namespace fusedkv {

using AttnKernelFunction = void (*)(AttnCudaParams);
using AttnCodedKernelFunction = void (*)(AttnCodedParams);

// T: bf16 or f16; kD: 64, 128 or 256; keys, values: 1 or 2, for mma_warp with kD = 256 one of each; rows: 16,
// 32 or 64. Each choice of template arguments is a translation unit (CMakeLists.txt), so that many compile
// side by side.
template <typename T, int kD>
AttnKernelFunction attn_mma_warp_kernel(int keys, int values);
template <typename T, int kD, int kKeys>
AttnKernelFunction attn_mma_block_kernel(int values, int rows);

// head_dim: 64, 128 or 256; any number of sources; dtype f32, bf16 or f16.
AttnKernelFunction attn_fallback_kernel(DType dtype, int head_dim);

// T: float, bf16 or f16, of q, raw caches and out; kD: 64, 128 or 256. Each is a translation unit.
template <typename T, int kD>
AttnCodedKernelFunction attn_coded_kernel();

}  // namespace fusedkv
