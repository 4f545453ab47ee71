// attn_with_kvcache and attn_schedule on the GPU.

#include <algorithm>

#include "api/attn_decode.h"
#include "api/device.h"
#include "ops/attn_decode/cuda_params.h"

namespace fusedkv::api {

namespace {

// The largest power of two up to 16 that divides the address and the strides, in bytes, of every row.
int alignment(const void* data, int64_t size, std::initializer_list<int64_t> strides) {
  uint64_t bits = reinterpret_cast<uintptr_t>(data) | 16;
  for (int64_t stride : strides) bits |= uint64_t(stride * size);
  return int(bits & -bits);
}

// The stride of a dim of size 1 is arbitrary.
int64_t used(int64_t stride, int64_t size) {
  return size > 1 ? stride : 0;
}

struct Alignments {
  int q, keys, values;
};

Alignments alignments(const AttnDecodeParams& p) {
  const int q = alignment(p.q, size_of(p.dtype),
                          {used(p.q_stride_b, p.B), used(p.q_stride_s, p.cu_seqlens_q ? p.total_q : p.S),
                           used(p.q_stride_h, p.H), p.q_stride_source});
  const auto of_caches = [&](const CacheTensor* caches, int count, CacheCode code) {
    int least = 16;
    for (int j = 0; j < count; ++j) {
      const CacheTensor& x = caches[j];
      const int64_t stride_b = p.block_table ? x.stride_b : used(x.stride_b, p.B);
      least = std::min(
          least, alignment(x.data, size_of(code, p.dtype), {stride_b, x.stride_t, used(x.stride_g, p.G)}));
    }
    return least;
  };
  return {q, of_caches(p.keys, p.num_keys, p.key_code), of_caches(p.values, p.num_values, p.value_code)};
}

// Bytes that a lane loads at once from a side: of codes of 8 channels, of which two per byte may lie in two
// places.
int load_width(CacheCode code, int64_t channels, int aligned) {
  if (code == CacheCode::raw) return aligned;
  const int most = code == CacheCode::i4 && channels / 2 % 8 ? 4 : 8;
  return aligned >= most ? most : aligned >= 4 ? 4 : 1;
}

// The factors of a side's tokens. The caches of a call have B sequences or some pages.
TokenFactors token_factors(const std::optional<std::vector<Tensor>>& scales, const char* name) {
  TokenFactors factors{};
  for (size_t j = 0; scales && j < scales->size(); ++j) {
    const Tensor& x = (*scales)[j];
    const auto stride = [&](int dim) {
      const int64_t elements = used(x.stride(dim), x.size(dim));
      check_value(elements <= INT32_MAX, Name(name, j),
                  " must have strides below 2^31 elements on a GPU, got ", elements, "; call .contiguous()");
      return int32_t(elements);
    };
    factors.data[j] = static_cast<const f16*>(x.const_data_ptr());
    factors.stride_b[j] = stride(0), factors.stride_t[j] = stride(1), factors.stride_g[j] = stride(2);
  }
  return factors;
}

// What the kernel of codes needs beside the rest. The factors are in the parameters, not in host memory.
void set_coded(AttnCodedParams& p, const AttnArguments& x, const Alignments& aligned,
               const AttnLaunch& launch) {
  AttnDecodeParams& a = p.attn;
  p.shared = launch.coded;
  p.q_width = aligned.q;
  p.key_width = load_width(a.key_code, a.D, aligned.keys);
  p.value_width = load_width(a.value_code, a.Dv, aligned.values);
  p.key_factors = token_factors(x.key_token_scales, "key_token_scales");
  p.value_factors = token_factors(x.value_token_scales, "value_token_scales");
  a.key_scales = a.value_scales = nullptr;
}

// A schedule (int32) is the running sum, B + 1 numbers, and then the counters: one per block of a grid and,
// if batch_invariant, one per work unit. Its length shows the mode. fusedkv_ext/ops/fakes.py computes it too.
int64_t num_counters(int64_t B, int64_t rows, int64_t G, bool batch_invariant) {
  return kMaxBlocks + (batch_invariant ? B * G * ((rows + kFallbackRows - 1) / kFallbackRows) : 0);
}

// The schedule of these costs, and its counters set to zero.
Tensor make_schedule(const Tensor& cache_seqlens, const std::optional<Tensor>& cu_seqlens_q,
                     const SequenceCosts& costs, int64_t num_counters) {
  const DeviceScope scope(cache_seqlens);
  Tensor schedule = torch::stable::new_empty(cache_seqlens, {costs.B + 1 + num_counters});
  AttnScheduleParams p{};
  p.costs = costs;
  p.num_counters = num_counters;
  p.schedule = static_cast<int32_t*>(schedule.mutable_data_ptr());
  p.counters = p.schedule + costs.B + 1;
  scope.uses(cache_seqlens, "cache_seqlens");
  uses(scope, cu_seqlens_q, "cu_seqlens_q");
  scope.makes(schedule, "schedule");
  check_launch(attn_schedule_cuda(p, scope.stream()), "attn_schedule");
  return schedule;
}

Tensor attn_schedule(Tensor cache_seqlens, int64_t query_length, int64_t num_heads, int64_t num_kv_heads,
                     int64_t capacity, int64_t window_left, bool batch_invariant) {
  check_int32(cache_seqlens, "cache_seqlens", 1, kCuda);
  check_value(query_length >= 0, "query_length must be at least 0, got ", query_length);
  check_value(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
              "num_heads must be a multiple of num_kv_heads = ", num_kv_heads, ", got ", num_heads);
  check_value(capacity >= 0, "capacity must be at least 0, got ", capacity);
  SequenceCosts costs{};
  costs.B = cache_seqlens.size(0);
  costs.S = query_length;
  costs.capacity = capacity;
  costs.window_left = window_left < INT32_MAX ? window_left : -1;
  costs.seq_lens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  costs.batch_invariant = batch_invariant;
  const int64_t rows = query_length * (num_heads / num_kv_heads);
  return make_schedule(cache_seqlens, {}, costs, num_counters(costs.B, rows, num_kv_heads, batch_invariant));
}

AttnResults attend(const AttnArguments& x) {
  AttnCodedParams p{};
  p.attn = attn_params(x, kCuda);
  AttnDecodeParams& a = p.attn;
  const CacheLayout layout =
      cache_layout(x.key_caches[0], "key_caches[0]", x.cache_seqlens, x.block_table, a.B, kCuda);
  set_options(a, layout, x);
  set_scores(a, x, kCuda);
  TokenScales scales;
  set_codes(a, x, kCuda, &scales);
  check_value(layout.capacity <= INT32_MAX - 2 * kFixedSplitTiles * kKVTileTokens,
              "key_caches[0] must hold fewer than 2^31 tokens per sequence, got ", layout.capacity);
  check_value(!x.schedule || !x.cu_seqlens_q, "schedule must be None with cu_seqlens_q, got a tensor");
  if (a.total_q == 0) return begin_results(a, x, kCuda);

  const DeviceScope scope(x.q);
  p.capacity = layout.capacity;
  p.cache_rows = int(std::min<int64_t>(x.block_table ? layout.num_pages : a.B, INT32_MAX));
  p.batch_invariant = x.batch_invariant;
  const Alignments aligned = alignments(a);
  p.aligned = std::min({aligned.q, aligned.keys, aligned.values}) == 16;
  p.whole_pages = !x.block_table || layout.page_size % 16 == 0;
  const int64_t rows = num_rows(a);
  int shared_limit = 0, blocks = 0;
  check_launch(attn_shared_limit(&shared_limit), "attn_with_kvcache");
  const bool coded = is_coded(a) || a.value_bias || x.q_sources;
  const AttnLaunch launch =
      attn_launch({a.dtype, a.B, rows, a.D, a.Dv, a.num_keys, a.num_values, p.aligned, shared_limit, coded});
  if (coded) set_coded(p, x, aligned, launch);
  check_launch(attn_blocks(a, launch, &blocks), "attn_with_kvcache");
  p.group = int(a.H / a.G);
  p.by_group = divisor(p.group);
  p.by_page_size = divisor(std::clamp<int64_t>(a.page_size, 1, INT32_MAX));
  p.rows = launch.rows;
  p.slot_rows = int(std::min<int64_t>(rows, launch.rows));
  p.row_groups = launch.row_groups;
  p.cost_sums = launch.cost_sums;
  p.max_splits = fixed_splits(p.capacity);

  const int64_t counters = num_counters(a.B, rows, a.G, p.batch_invariant);
  std::optional<Tensor> schedule = x.schedule;
  if (!schedule && a.B > kMaxCopiedBatch)
    schedule = make_schedule(x.cache_seqlens, x.cu_seqlens_q, sequence_costs(p), counters);
  Tensor own_counters;
  if (schedule) {
    check_int32(*schedule, "schedule", 1, kCuda);
    check_value(schedule->size(0) == a.B + 1 + counters, "schedule must have ", a.B + 1 + counters,
                " entries, got ", schedule->size(0),
                "; compute it with decode_schedule for this batch, these heads and this mode");
    p.schedule = static_cast<const int32_t*>(schedule->const_data_ptr());
    p.counters = static_cast<int32_t*>(schedule->mutable_data_ptr()) + a.B + 1;
  } else {
    p.counters = scope.zeros(x.cache_seqlens, counters, &own_counters);
  }
  const int64_t slots = partial_slots(a.B * a.G * p.row_groups, blocks, p.max_splits, p.batch_invariant);
  check_value(slots <= INT32_MAX, "batch_invariant calls must have fewer than 2^31 splits, got ", slots);
  const int64_t floats = slots * p.slot_rows * (a.Dv + 1);
  Tensor partial = x.workspace ? *x.workspace : torch::stable::new_empty(x.q, {floats}, ScalarType::Float);
  a.partial_out = caller_workspace(partial, floats, kCuda);
  a.partial_lse = a.partial_out + slots * p.slot_rows * a.Dv;

  x.for_each_input([&](const Tensor& read, Name name) {
    check_same_gpu(read, name, x.q, "q");
    scope.uses(read, "an input");
  });
  for (const auto* written : {&x.out, &x.workspace})
    if (*written) check_same_gpu(**written, written == &x.out ? "out" : "workspace", x.q, "q");
  const AttnResults results = begin_results(a, x, kCuda);
  if (schedule && !x.schedule) scope.uses(*schedule, "schedule");
  for (const Tensor* made : {&std::get<0>(results), &std::get<1>(results), &std::as_const(partial)})
    scope.makes(*made, "an output");
  check_launch(attn_decode_cuda(p, launch, blocks, scope.stream()), "attn_with_kvcache");
  return results;
}

}  // namespace

FUSEDKV_DEVICE_IMPL(m) {
  m.impl("attn_with_kvcache", TORCH_BOX(&attn_with_kvcache<attend>));
  m.impl("attn_with_kvcache_out", TORCH_BOX(&attn_with_kvcache_out<attend>));
  m.impl("attn_schedule", TORCH_BOX(&attn_schedule));
}

}  // namespace fusedkv::api
