// Before an op writes into arguments: no memory is shared with another element or argument, and the tensor's
// version is incremented.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "api/checks.h"

namespace fusedkv::api {

// Sums of integers times strides. A byte of a tensor has the address data + sum_k i_k stride_k + u, with i_k
// below the k-th size and u below the element size. Two tensors share a byte if the difference of two such
// sums can be the difference of their addresses.
class Sums {
 public:
  // Adds stride * low .. stride * high. Dims of two tensors with the same stride are merged: for slices of
  // one packed tensor the search then has one or two choices per stride.
  void add(int64_t stride, int64_t low, int64_t high, bool merge) {
    Term* at = terms_;
    while (at < terms_ + count_ && at->stride > stride) ++at;
    if (merge && at < terms_ + count_ && at->stride == stride) {
      at->low += low;
      at->high += high;
      return;
    }
    std::copy_backward(at, terms_ + count_, terms_ + count_ + 1);
    *at = {stride, low, high};
    ++count_;
  }

  bool contain(int64_t sum) const { return contain(0, sum); }

  // Whether a sum is 0 although not all of its integers are 0. By symmetry, the first nonzero one is
  // positive.
  bool cancel() {
    for (int i = 0; i < count_; ++i) {
      terms_[i].low = 1;
      if (contain(i, 0)) return true;  // the earlier ones are 0
    }
    return false;
  }

 private:
  struct Term {
    int64_t stride, low, high;
  };

  bool contain(int i, int64_t sum) const {
    if (i == count_) return sum == 0;
    int64_t low = 0, high = 0;  // the range of the smaller strides' sum
    for (int j = i + 1; j < count_; ++j) {
      low += terms_[j].stride * terms_[j].low;
      high += terms_[j].stride * terms_[j].high;
    }
    const Term& x = terms_[i];
    const int64_t last = std::min(x.high, floor_div(sum - low, x.stride));
    for (int64_t n = std::max(x.low, -floor_div(high - sum, x.stride)); n <= last; ++n)
      if (contain(i + 1, sum - n * x.stride)) return true;
    return false;
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  Term terms_[2 * 4 + 1] = {};  // of two tensors of 4 dims, and of the bytes of an element
  int count_ = 0;
};

// The addresses of a tensor of up to 4 dims. A dim of one element has stride 0.
struct Extent {
  Name name;
  const char* begin = nullptr;
  const char* end = nullptr;  // begin: the tensor is empty
  int64_t element = 0, sizes[4] = {}, strides[4] = {};

  Extent(const Tensor& x, Name name) : name(name) {
    const auto own_sizes = x.sizes(), own_strides = x.strides();
    int64_t last = 0;
    for (size_t i = 0; i < own_sizes.size(); ++i) {
      if (own_sizes[i] == 0) return;
      sizes[i] = own_sizes[i];
      strides[i] = sizes[i] > 1 ? own_strides[i] : 0;
      last += (sizes[i] - 1) * strides[i];
    }
    element = int64_t(x.element_size());
    for (int64_t& stride : strides) stride *= element;
    begin = static_cast<const char*>(x.const_data_ptr());
    end = begin + (last + 1) * element;
  }

  bool overlaps_itself() const {
    if (begin == end) return false;
    Sums differences;
    for (int i = 0; i < 4; ++i) {
      if (sizes[i] <= 1) continue;
      if (strides[i] == 0) return true;
      differences.add(strides[i], 1 - sizes[i], sizes[i] - 1, false);
    }
    return differences.cancel();
  }

  bool overlaps(const Extent& other) const {
    if (begin >= other.end || other.begin >= end) return false;
    Sums differences;
    differences.add(1, 1 - other.element, element - 1, true);
    for (int i = 0; i < 4; ++i) {
      if (strides[i]) differences.add(strides[i], 0, sizes[i] - 1, true);
      if (other.strides[i]) differences.add(other.strides[i], 1 - other.sizes[i], 0, true);
    }
    return differences.contain(other.begin - begin);
  }

  // The same elements in the same order.
  bool is(const Extent& other) const {
    return begin == other.begin && element == other.element && std::equal(sizes, sizes + 4, other.sizes) &&
           std::equal(strides, strides + 4, other.strides);
  }
};

inline void check_own_memory(const Extent& written) {
  check_value(
      !written.overlaps_itself(), written.name,
      " must have memory of its own for each element, got elements that overlap, as in an expanded tensor; "
      "call .contiguous()");
}

inline void check_apart(const Extent& written, const Extent& other) {
  check_value(!written.overlaps(other), other.name, " must not share memory with ", written.name,
              ", which is written; call .clone()");
}

// Increments the version of x, so that a backward that has saved it raises. A copy of a tensor onto itself
// copies nothing, but counts as a write in place.
inline void count_write(const Tensor& x, Name name) {
  if (x.numel() == 0) return;
  check_value(aoti_torch_copy_(x.get(), x.get(), 0) == 0, name,
              " must be writable, got an inference tensor outside of torch.inference_mode() or one that "
              "requires grad "
              "under grad mode; call .clone() or .detach()");
}

}  // namespace fusedkv::api
