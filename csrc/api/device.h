// What the registrations of the GPU ops share. They are compiled twice: for CUDA tensors, as the CUDA
// implementation of torch.ops.fusedkv, and with FUSEDKV_SIMT for CPU tensors, as torch.ops.fusedkv_simt. The
// executor runs the kernels of the latter.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

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

  // `count` zeros in `own`, an int32 tensor as `like`.
  int32_t* zeros(const Tensor& like, int64_t count, Tensor* own) const {
    *own = torch::stable::new_empty(like, {count});
    uses(*own, "counters");
    return static_cast<int32_t*>(std::memset(own->mutable_data_ptr(), 0, size_t(count) * sizeof(int32_t)));
  }

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

  // `count` zeros for a kernel that leaves zeros. Calls on one stream run one after another and share theirs.
  // A graph may be replayed on any stream: while one is captured, the call's zeros are in `own`, an int32
  // tensor as `like`, which the graph clears.
  int32_t* zeros(const Tensor& like, int64_t count, Tensor* own) const;

  void uses(const Tensor&, const char*) const {}
  void makes(const Tensor&, const char*) const {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline int32_t* DeviceScope::zeros(const Tensor& like, int64_t count, Tensor* own) const {
  const auto check = [](cudaError_t error) {
    if (error) fail("RuntimeError", "no memory for counters: ", cudaGetErrorString(error));
  };
  auto* const stream = static_cast<cudaStream_t>(stream_);
  const auto cleared = [&](void* data, int64_t n) {
    check(cudaMemsetAsync(data, 0, size_t(n) * sizeof(int32_t), stream));
    return static_cast<int32_t*>(data);
  };
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) {
    *own = torch::stable::new_empty(like, {count});
    return cleared(own->mutable_data_ptr(), count);
  }
  struct Kept {
    int32_t* data = nullptr;
    int64_t count = 0;
  };
  static std::mutex mutex;
  static std::map<std::pair<int, void*>, Kept> of_streams;
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& kept = of_streams[{like.get_device_index(), stream_}];
  if (kept.count < count) {
    // Not torch's memory: the pool of a graph must not lose a part to later calls. Kernels may still use the
    // smaller block, so it stays.
    const int64_t n = std::max(count, 2 * kept.count);
    void* data = nullptr;
    auto mode = cudaStreamCaptureModeRelaxed;  // another thread may capture
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    const cudaError_t error = cudaMalloc(&data, size_t(n) * sizeof(int32_t));
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    check(error);
    kept = {cleared(data, n), n};
  }
  return kept.data;
}

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
