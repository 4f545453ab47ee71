// What the CPU and the CUDA registration of fuse_kv share: checks and parameters.
#pragma once

#include "api/checks.h"

namespace fusedkv::api {

inline FuseKVParams fuse_kv_params(const std::vector<Tensor>& sources, const Tensor& weights, bool cuda) {
  check_count(sources.size(), "sources");
  FuseKVParams p{};
  p.m = int(sources.size());
  for (int j = 0; j < p.m; ++j) {
    const Tensor& x = sources[j];
    const std::string name = name_of("sources", j);
    check_device(x, name, cuda);
    check_rank4(x, name, "(B, T, G, D)");
    check_same_shape(x, name, sources[0], "sources[0]");
    check_same_dtype(x, name, sources[0], "sources[0]");
    p.sources[j] = {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  }
  const Tensor& first = sources[0];
  p.dtype = dtype_of(first, "sources[0]");
  p.B = first.size(0);
  p.T = first.size(1);
  p.G = first.size(2);
  p.D = first.size(3);
  check_head_dim(p.D, "sources[0]");
  check_weights(weights, "weights", p.m, p.G, p.D, p.dtype == DType::f64, cuda);
  p.weights = weights.const_data_ptr();
  return p;
}

}  // namespace fusedkv::api
