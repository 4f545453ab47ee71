// Defines torch.ops.fusedkv.

#include "api/schema.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fusedkv, m) {
  fusedkv::api::define_ops(m);
}
