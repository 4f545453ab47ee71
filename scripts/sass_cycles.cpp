// Prints the parameters of one call of the decode kernel as hexadecimal words, after the threads of a block.
// The fields that only some revisions have are set where they exist. Addresses are those of sass_cycles.py.
//
//   sass_cycles SOURCES ROWS TOKENS

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ops/attn_decode/cuda_params.h"

// p.field = value, if there is such a field.
#define SET(p, field, value)                              \
  [&](auto& x) {                                          \
    if constexpr (requires { x.field; }) x.field = value; \
  }(p)

namespace {

constexpr int64_t kBatch = 8, kHeads = 8, kDim = 128, kPage = 16, kPages = 1 << 20;
constexpr uint64_t kQueries = 0x100000000, kOut = 0x200000000, kLse = 0x210000000, kPartialOut = 0x220000000,
                   kPartialLse = 0x230000000, kKeyWeights = 0x240000000, kValueWeights = 0x250000000,
                   kLengths = 0x260000000, kTable = 0x270000000, kSchedule = 0x280000000,
                   kCounters = 0x290000000, kCaches = 0x1000000000;

fusedkv::CacheTensor cache(int i) {
  fusedkv::CacheTensor x{};
  x.data = reinterpret_cast<const void*>(kCaches * (i + 1));
  x.stride_b = kPage * kHeads * kDim, x.stride_t = kHeads * kDim, x.stride_g = kDim;
  return x;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  using namespace fusedkv;
  const int sources = atoi(arguments[1]), rows = atoi(arguments[2]);
  const int64_t tokens = atoll(arguments[3]);
  AttnCudaParams p;
  memset(static_cast<void*>(&p), 0, sizeof p);
  AttnDecodeParams& a = p.attn;
  const auto at = [](uint64_t address) { return reinterpret_cast<void*>(address); };
  a.dtype = DType::bf16;
  a.B = kBatch, a.S = 1, a.H = rows * kHeads, a.G = kHeads, a.D = a.Dv = kDim;
  a.q = at(kQueries);
  a.q_stride_b = a.q_stride_s = a.H * kDim, a.q_stride_h = kDim;
  a.num_keys = a.num_values = sources;
  for (int j = 0; j < sources; ++j) a.keys[j] = cache(j), a.values[j] = cache(sources + j);
  if (sources > 1) {
    a.key_weights = static_cast<const float*>(at(kKeyWeights));
    a.value_weights = static_cast<const float*>(at(kValueWeights));
  }
  a.seq_lens = static_cast<const int32_t*>(at(kLengths));
  a.block_table = static_cast<const int32_t*>(at(kTable));
  a.block_table_stride = tokens / kPage, a.page_size = kPage;
  a.scale = 0.088388f;
  a.window_left = -1;
  a.window_right = 0;
  a.partial_out = static_cast<float*>(at(kPartialOut)), a.partial_lse = static_cast<float*>(at(kPartialLse));
  a.out = at(kOut), a.lse = static_cast<float*>(at(kLse));
  AttnShape shape{};
  shape.dtype = a.dtype, shape.rows = rows, shape.D = shape.Dv = kDim, shape.aligned = true;
  shape.num_keys = shape.num_values = sources, shape.shared_limit = 227 * 1024;
  SET(shape, B, kBatch);
  const AttnLaunch launch = attn_launch(shape);
  SET(p, capacity, tokens);
  SET(p, num_pages, kPages);
  SET(p, cache_rows, kPages);
  SET(p, group, rows);
  SET(p, num_rows, rows);
  SET(p, rows, launch.rows);
  SET(p, row_groups, launch.row_groups);
  SET(p, slot_rows, rows);
  SET(p, max_splits, 1);
  SET(p, aligned, true);
  SET(p, whole_pages, true);
  SET(p, schedule, static_cast<const int32_t*>(at(kSchedule)));
  SET(p, counters, static_cast<int32_t*>(at(kCounters)));
  [&](auto& x, const auto& l) {
    if constexpr (requires {
                    x.cost_sums;
                    l.cost_sums;
                  })
      x.cost_sums = l.cost_sums;
  }(p, launch);
  printf("%d\n", launch.threads);
  for (size_t i = 0; i < sizeof p; i += 4) {
    uint32_t word;
    memcpy(&word, reinterpret_cast<const char*>(&p) + i, 4);
    printf("%08x\n", word);
  }
}
