// The pybind11 module fusedkv_ext._C. Importing it registers the ops (api/); what it exports is about the
// build itself.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_facts.h"
#include "common/huge_pages.h"
#include "common/kept_memory.h"
#include "common/limits.h"
#include "cpu/simd_targets.h"
#include "cpu/workspace.h"
#include "ops/attn_decode/cuda_params.h"

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
  info["cuda"] = FUSEDKV_BUILD_CUDA;
  info["cuda_code"] = FUSEDKV_BUILD_CUDA_CODE;
  info["cuda_reason"] = FUSEDKV_BUILD_CUDA_REASON;
  info["warning"] = FUSEDKV_BUILD_WARNING;
  info["max_sources"] = fusedkv::kMaxSources;
  info["split_tokens"] = fusedkv::kSplitTokens;
  info["cell_tokens"] = fusedkv::kCellTokens;
  info["fixed_split_tokens"] = fusedkv::kFixedSplitCells * fusedkv::kCellTokens;
  info["item_cost_cells"] = fusedkv::kItemCostCells;
  return info;
}

// The GPU kernel of a call and how its work is cut, by the functions that cut it. `cost`: cells of all
// sequences, and of each one more, times KV heads. How many blocks fit on an SM is judged by shared memory
// alone.
pybind11::dict decode_launch(int64_t rows, int64_t head_dim, int64_t value_dim, int num_keys, int num_values,
                             int element_size, int64_t cost, int sm_count, int shared_per_block) {
  using namespace fusedkv;
  const DType dtype = element_size == 4 ? DType::f32 : DType::bf16;
  const AttnLaunch launch =
      attn_launch({dtype, rows, head_dim, value_dim, num_keys, num_values, true, shared_per_block});
  // Every block takes 1 KiB more than it asks for, and an SM has 1 KiB more than the largest block may ask
  // for.
  const int blocks = grid_blocks(sm_count, (shared_per_block + 1024) / (launch.shared_bytes + 1024));
  pybind11::dict out;
  out["kernel"] = launch.kernel == AttnKernel::kGeneric ? "generic" : "tensor cores";
  out["rows"] = launch.rows;
  out["threads"] = launch.threads;
  out["shared_bytes"] = launch.shared_bytes;
  out["blocks"] = blocks;
  out["cells_per_block"] = block_share(cost * launch.row_groups, blocks, false);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fusedkv_ext: registers torch.ops.fusedkv and describes the build.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("decode_launch", &decode_launch, pybind11::arg("rows"), pybind11::arg("head_dim"),
        pybind11::arg("value_dim"), pybind11::arg("num_keys"), pybind11::arg("num_values"),
        pybind11::arg("element_size"), pybind11::arg("cost"), pybind11::arg("sm_count"),
        pybind11::arg("shared_per_block"),
        "The GPU kernel of a cached-attention call, its block and its grid.");
  m.def("cpu_levels", &cpu_levels, "SIMD levels of this build that this CPU runs, best first.");
  m.def("cpu_level", [] { return std::string(fusedkv::cpu_kernels().level); }, "The SIMD level in use.");
  m.def(
      "set_cpu_level", [](const std::string& level) { return fusedkv::set_cpu_level(level.c_str()); },
      "Use this SIMD level from now on; False if it is not one of cpu_levels().");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, int64_t nbytes) {
        return fusedkv::advise_huge_pages(reinterpret_cast<void*>(address), nbytes);
      },
      pybind11::arg("address"), pybind11::arg("nbytes"),
      "Asks for huge pages inside memory that is still to be written; False if there is none to ask for.");
  m.def("workspace_allocations", &fusedkv::workspace_allocations,
        "How often the scratch memory of a CPU thread has had to grow.");
  m.def("kept_memory_bytes", &fusedkv::kept_memory_bytes,
        "Bytes of freed CPU results kept for the next ones.");
  m.def("release_kept_memory", &fusedkv::release_kept_memory, "Gives them back to the system.");
}
