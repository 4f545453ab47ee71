// The pybind11 module fusedkv_ext._C. Importing it registers the ops (api/); what it exports is about the
// build itself.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "kernels/cpu_kernels.h"

namespace {

std::vector<std::string> cpu_levels() {
  const fusedkv::CpuKernels* const* tables;
  const int count = fusedkv::cpu_levels(&tables);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->level);
  return names;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = FUSEDKV_BUILD_TORCH;
  info["cuda_archs"] = FUSEDKV_BUILD_CUDA_ARCHS;
  info["max_sources"] = fusedkv::kMaxSources;
  info["split_tokens"] = fusedkv::kSplitTokens;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fusedkv_ext: registers torch.ops.fusedkv and describes the build.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("cpu_levels", &cpu_levels, "SIMD levels of this build that this CPU runs, best first.");
  m.def("cpu_level", [] { return std::string(fusedkv::cpu_kernels().level); }, "The SIMD level in use.");
  m.def(
      "set_cpu_level", [](const std::string& level) { return fusedkv::set_cpu_level(level.c_str()); },
      "Use this SIMD level from now on; False if it is not one of cpu_levels().");
}
