// Defines torch.ops.fusedkv_simt: the ops of torch.ops.fusedkv for CPU tensors with the GPU's kernels, run by
// the executor of csrc/simt, and the executor's settings and self-tests. For tests; part of no wheel.

#include <torch/csrc/stable/library.h>

#include "api/device.h"
#include "api/schema.h"
#include "simt/executor.h"
#include "simt/selftest.h"

namespace fusedkv::api {

namespace {

// For all later calls: the seed of the executor's choices, and the device that kernels see.
void configure(int64_t seed, int64_t sm_count, int64_t shared_per_block) {
  check_value(sm_count > 0 && shared_per_block >= 0,
              "sm_count must be at least 1 and shared_per_block at least 0, got ", sm_count, " and ",
              shared_per_block);
  simt::settings() = {uint64_t(seed), int(sm_count), int(shared_per_block)};
}

// `a`, `b` and `out` hold 4-byte elements.
void selftest(std::string kernel, bool fault, Tensor a, Tensor b, Tensor out) {
  const DeviceScope scope(a);
  scope.uses(a, "a");
  scope.uses(b, "b");
  scope.uses(out, "out");
  const bool known = simt::run_selftest(
      kernel.c_str(),
      {static_cast<const uint32_t*>(a.const_data_ptr()), static_cast<const uint32_t*>(b.const_data_ptr()),
       static_cast<uint32_t*>(out.mutable_data_ptr()), int(a.numel()), fault ? 1 : 0});
  check_value(known, "kernel must be the name of a self-test, got ", kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedkv_simt, m) {
  define_ops(m);
  m.def("configure(int seed, int sm_count, int shared_per_block) -> ()");
  m.def("selftest(str kernel, bool fault, Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

// For every backend, even none: configure has no tensors.
STABLE_TORCH_LIBRARY_IMPL(fusedkv_simt, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
}

FUSEDKV_DEVICE_IMPL(m) {
  m.impl("selftest", TORCH_BOX(&selftest));
}

}  // namespace fusedkv::api
