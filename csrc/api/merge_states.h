// Parameters of merge_states from its arguments, the same on every backend.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "api/checks.h"
#include "api/new_tensor.h"
#include "ops/merge_states/params.h"

namespace fusedkv::api {

struct MergedStates {
  MergeStatesParams params;
  Tensor out, lse;
};

// Checks the arguments and makes the results.
inline MergedStates merged_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                                  bool cuda) {
  check_count(outs.size(), "outs");
  check_value(lses.size() == outs.size(), "lses must hold ", outs.size(), " tensors as outs, got ",
              lses.size());
  const Tensor& first = outs[0];
  MergeStatesParams p{};
  p.n = int(outs.size());
  for (int i = 0; i < p.n; ++i) {
    const Tensor &out = outs[i], &lse = lses[i];
    const Name out_name = name_of("outs", i), lse_name = name_of("lses", i);
    check_device(out, out_name, cuda);
    check_device(lse, lse_name, cuda);
    check_rank4(out, out_name, "(B, S, H, D)");
    check_same_shape(out, out_name, first, "outs[0]");
    check_same_dtype(out, out_name, first, "outs[0]");
    check_type(lse.scalar_type() == ScalarType::Float, lse_name, " must be float32, got ", DTypeOf{lse});
    check_value(lse.dim() == 3 && lse.size(0) == first.size(0) && lse.size(1) == first.size(2) &&
                    lse.size(2) == first.size(1),
                lse_name, " must have shape (", first.size(0), ", ", first.size(2), ", ", first.size(1),
                ") as outs[0] says, got ", Shape{lse});
    p.states[i] = {out.const_data_ptr(),
                   out.stride(0),
                   out.stride(1),
                   out.stride(2),
                   static_cast<const float*>(lse.const_data_ptr()),
                   lse.stride(0),
                   lse.stride(1),
                   lse.stride(2)};
  }
  p.dtype = dtype_of(first, "outs[0]");
  check_type(p.dtype != DType::f64, "outs[0] must be float32, bfloat16 or float16, got float64");
  p.B = first.size(0);
  p.S = first.size(1);
  p.H = first.size(2);
  p.D = first.size(3);
  check_head_dim(p.D, "outs[0]");
  Tensor out = empty_tensor(first, {p.B, p.S, p.H, p.D}, dtype_code(first));
  Tensor lse = empty_tensor(first, {p.B, p.H, p.S}, aoti_torch_dtype_float32());
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {p, out, lse};
}

}  // namespace fusedkv::api
