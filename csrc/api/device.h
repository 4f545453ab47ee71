// What the registrations of the GPU ops share. They are compiled twice: for CUDA tensors, as the CUDA
// implementation of torch.ops.fusedkv, and with FUSEDKV_SIMT for CPU tensors, as torch.ops.fusedkv_simt. The
// executor runs the kernels of the latter.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "api/checks.h"

#if defined(FUSEDKV_SIMT)
#include "simt/memory.h"
#define FUSEDKV_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fusedkv_simt, CPU, m)
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define FUSEDKV_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fusedkv, CUDA, m)
#endif

namespace fusedkv::api {

#if defined(FUSEDKV_SIMT)

constexpr bool kCuda = false;  // the device of their tensors

// The memory that the kernels of one op may touch: everything else is out of bounds.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  ~DeviceScope() { simt::forget_buffers(); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  void* stream() const { return nullptr; }

  void uses(const Tensor& x, const char* name) const {
    if (size_t bytes = extent(x)) simt::register_buffer(x.const_data_ptr(), bytes, name);
  }

  // A new tensor. It is filled with NaN, which shows reads before writes and missing writes.
  void makes(const Tensor& x, const char* name) const {
    if (size_t bytes = extent(x)) std::memset(x.mutable_data_ptr(), 0xff, bytes);
    uses(x, name);
  }

 private:
  static size_t extent(const Tensor& x) {
    int64_t elements = 1;
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (x.size(i) == 0) return 0;
      elements += (x.size(i) - 1) * x.stride(i);
    }
    return size_t(elements) * size_t(x.element_size());
  }
};

inline void check_launch(int, const char*) {}

#else

constexpr bool kCuda = true;

// Makes the tensor's GPU the current one in this scope, and has its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

  void uses(const Tensor&, const char*) const {}
  void makes(const Tensor&, const char*) const {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(int error, const char* op) {
  if (error) fail("RuntimeError", op, " could not be launched: ", cudaGetErrorString(cudaError_t(error)));
}

#endif

inline void uses(const DeviceScope& scope, const std::vector<Tensor>& tensors, const char* name) {
  for (const Tensor& x : tensors) scope.uses(x, name);
}

inline void uses(const DeviceScope& scope, const std::optional<Tensor>& tensor, const char* name) {
  if (tensor) scope.uses(*tensor, name);
}

// All tensors of an op are on the GPU of the first.
inline void check_same_gpu(const Tensor& x, Name name, const Tensor& first, Name first_name) {
  if (!kCuda) return;
  check_value(x.get_device_index() == first.get_device_index(), name, " must be on GPU ",
              first.get_device_index(), " as ", first_name, ", got GPU ", x.get_device_index());
}

}  // namespace fusedkv::api
