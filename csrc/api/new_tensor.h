// New tensors for small results. torch::stable::new_empty finds its operator by name and boxes every
// argument; for a short call that costs as much as its arithmetic.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>

namespace fusedkv::api {

using torch::stable::Tensor;

// torch's number of a dtype.
inline int32_t dtype_code(const Tensor& x) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

// A contiguous tensor of up to 4 dims on like's device, not initialized.
inline Tensor empty_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(), dtype,
                                                  device_type, device_index, &made));
  return Tensor(made);
}

}  // namespace fusedkv::api
