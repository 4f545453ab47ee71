// merge_states on the GPU.

#include "api/merge_states.h"

#include "api/device.h"

namespace fusedkv::api {

namespace {

std::tuple<Tensor, Tensor> merge_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  check_count(outs.size(), "outs");
  check_device(outs[0], "outs[0]", kCuda);
  const DeviceScope scope(outs[0]);
  const MergedStates merged = merged_states(outs, lses, kCuda);
  const MergeStatesParams& p = merged.params;
  check_value(p.B * p.S * p.H * p.D <= INT32_MAX, "outs[0] must have fewer than 2^31 elements, got ",
              Shape{outs[0]});
  for (size_t i = 0; i < outs.size(); ++i) {
    check_same_gpu(outs[i], name_of("outs", i), outs[0], "outs[0]");
    check_same_gpu(lses[i], name_of("lses", i), outs[0], "outs[0]");
  }
  uses(scope, outs, "outs");
  uses(scope, lses, "lses");
  scope.makes(merged.out, "the output");
  scope.makes(merged.lse, "the log-sum-exp");
  check_launch(merge_states_cuda(p, scope.stream()), "merge_states");
  return {merged.out, merged.lse};
}

}  // namespace

FUSEDKV_DEVICE_IMPL(m) {
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

}  // namespace fusedkv::api
