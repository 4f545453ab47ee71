// Registration of the CUDA ops; linked into _C_cuda only where torch has CUDA.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "api/fuse_kv.h"

namespace fusedkv::api {

namespace {

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

// The kernel reads 16 bytes at a time: a source that is not aligned so is copied first.
bool aligned16(const TokenTensor& x, DType dtype) {
  const int64_t per_piece = 16 / size_of(dtype);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_b % per_piece == 0 &&
         x.stride_t % per_piece == 0 && x.stride_g % per_piece == 0;
}

Tensor fuse_kv(std::vector<Tensor> sources, Tensor weights) {
  FuseKVParams p = fuse_kv_params(sources, weights, /*cuda=*/true);
  for (int j = 0; j < p.m; ++j) {
    check_value(sources[j].get_device_index() == weights.get_device_index(), name_of("sources", j),
                " is on GPU ", sources[j].get_device_index(), "; expected GPU ", weights.get_device_index(),
                " as weights");
    if (!aligned16(p.sources[j], p.dtype)) {
      sources[j] = torch::stable::clone(sources[j]);
      sources[j] = torch::stable::contiguous(sources[j]);
      p.sources[j] = {sources[j].const_data_ptr(), sources[j].stride(0), sources[j].stride(1),
                      sources[j].stride(2)};
    }
  }
  const torch::stable::accelerator::DeviceGuard guard(sources[0].get_device_index());
  Tensor out = torch::stable::new_empty(sources[0], {p.B, p.T, p.G, p.D});
  p.out = out.mutable_data_ptr();
  const auto error = cudaError_t(fuse_kv_forward_cuda(p, current_stream(out)));
  if (error != cudaSuccess)
    fail("RuntimeError", "fuse_kv could not be launched: ", cudaGetErrorString(error));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkv, CUDA, m) {
  m.impl("fuse_kv", TORCH_BOX(&fuse_kv));
}

}  // namespace fusedkv::api
