// The pybind11 module fusedkv_ext._C. Its import registers the ops (api/); its functions describe the build
// and the selection of kernels.

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
  const int count = fusedkv::simd_targets(&tables);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->target);
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
  info["max_head_dim"] = fusedkv::kMaxHeadDim;
  info["task_rows"] = fusedkv::kMaxTaskRows;
  info["max_blocks"] = fusedkv::kMaxBlocks;
  info["fallback_rows"] = fusedkv::kFallbackRows;
  info["cpu_kernel"] = fusedkv::kCpuKernelFile;
  info["split_tokens"] = fusedkv::kSplitTokens;
  info["cell_tokens"] = fusedkv::kKVTileTokens;
  info["fixed_split_tokens"] = fusedkv::kFixedSplitTiles * fusedkv::kKVTileTokens;
  info["item_cost_cells"] = fusedkv::kUnitCostTiles;
  return info;
}

// The GPU kernel of a call and how its work is divided, by the functions that divide it. `cost`: the KV tiles
// of all sequences, plus one per sequence, times KV heads. Shared memory alone decides how many blocks fit on
// an SM.
pybind11::dict decode_launch(int64_t batch, int64_t rows, int64_t num_kv_heads, int64_t head_dim,
                             int64_t value_dim, int num_keys, int num_values, int element_size, int64_t cost,
                             int64_t capacity, bool batch_invariant, int sm_count, int shared_per_block,
                             bool coded) {
  using namespace fusedkv;
  const DType dtype = element_size == 4 ? DType::f32 : DType::bf16;
  const AttnLaunch launch = attn_launch(
      {dtype, batch, rows, head_dim, value_dim, num_keys, num_values, true, shared_per_block, coded});
  // Every block uses 1 KiB more than it requests, and an SM has 1 KiB more than the largest block may
  // request.
  const int blocks = grid_blocks(sm_count, (shared_per_block + 1024) / (launch.shared_bytes + 1024));
  pybind11::dict out;
  out["kernel"] = kernel_file(launch.kernel);
  out["rows"] = launch.rows;
  out["threads"] = launch.threads;
  out["shared_bytes"] = launch.shared_bytes;
  out["blocks"] = blocks;
  out["cells_per_block"] = block_quota(cost * launch.row_groups, blocks, false);
  const int64_t units = batch * num_kv_heads * launch.row_groups;
  const int64_t slots = partial_slots(units, blocks, fixed_splits(capacity), batch_invariant);
  out["workspace_floats"] = slots * std::min<int64_t>(rows, launch.rows) * (value_dim + 1);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fusedkv_ext: registers torch.ops.fusedkv and describes the build.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("decode_launch", &decode_launch, pybind11::arg("batch"), pybind11::arg("rows"),
        pybind11::arg("num_kv_heads"), pybind11::arg("head_dim"), pybind11::arg("value_dim"),
        pybind11::arg("num_keys"), pybind11::arg("num_values"), pybind11::arg("element_size"),
        pybind11::arg("cost"), pybind11::arg("capacity"), pybind11::arg("batch_invariant"),
        pybind11::arg("sm_count"), pybind11::arg("shared_per_block"), pybind11::arg("coded"),
        "The GPU kernel of a cached-attention call, its block and its grid.");
  m.def("cpu_levels", &cpu_levels, "SIMD targets of this build that this CPU supports, best first.");
  m.def("cpu_level", [] { return std::string(fusedkv::cpu_kernels().target); }, "The SIMD target in use.");
  m.def(
      "set_cpu_level", [](const std::string& target) { return fusedkv::set_simd_target(target.c_str()); },
      "Use this SIMD target from now on; False if it is not one of cpu_levels().");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, int64_t nbytes) {
        return fusedkv::advise_huge_pages(reinterpret_cast<void*>(address), nbytes);
      },
      pybind11::arg("address"), pybind11::arg("nbytes"),
      "Requests huge pages for memory that is not yet written; False if it has no whole huge page.");
  m.def("workspace_allocations", &fusedkv::workspace_allocations,
        "How often the scratch memory of the CPU threads has grown.");
  m.def("kept_memory_bytes", &fusedkv::kept_memory_bytes, "Bytes of freed CPU results kept for reuse.");
  m.def("release_kept_memory", &fusedkv::release_kept_memory, "Returns that memory to the system.");
}
