// The decode kernels by their template arguments, for launch.cu.
#pragma once

#include <type_traits>

#include "ops/attn_decode/cuda_params.h"

namespace fusedkv {

using AttnKernelFunction = void (*)(AttnCudaParams);

// head_dim: 64, 128, or 256 with one source of each; keys, values: 1 or 2; dtype bf16 or f16.
AttnKernelFunction attn_mma_warp_kernel(DType dtype, int head_dim, int keys, int values);
AttnKernelFunction attn_mma_block_kernel(DType dtype, int head_dim, int keys, int values,
                                         int rows);  // 16, 32 or 64

// head_dim: 64, 128 or 256; any number of sources; dtype f32, bf16 or f16.
AttnKernelFunction attn_fallback_kernel(DType dtype, int head_dim);

// Calls fn(TypeTag<T>, constant head dim, constant keys, constant values).
template <typename Fn>
AttnKernelFunction mma_kernel(DType dtype, int head_dim, int keys, int values, const Fn& fn) {
  const auto with = [&](auto type) {
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (head_dim == 256) return fn(type, std::integral_constant<int, 256>{}, One{}, One{});
    const auto with_dim = [&](auto d) {
      if (keys == 1) return values == 1 ? fn(type, d, One{}, One{}) : fn(type, d, One{}, Two{});
      return values == 1 ? fn(type, d, Two{}, One{}) : fn(type, d, Two{}, Two{});
    };
    return head_dim == 64 ? with_dim(std::integral_constant<int, 64>{})
                          : with_dim(std::integral_constant<int, 128>{});
  };
  return dtype == DType::bf16 ? with(TypeTag<bf16>{}) : with(TypeTag<f16>{});
}

}  // namespace fusedkv
