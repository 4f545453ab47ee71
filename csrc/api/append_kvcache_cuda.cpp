// append_kvcache on the GPU.

#include "api/append_kvcache.h"

#include "api/device.h"

namespace fusedkv::api {

namespace {

Tensor append_kvcache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,
                      std::optional<Tensor> block_table, std::optional<Tensor> rotary_cos,
                      std::optional<Tensor> rotary_sin, bool rotary_interleaved, std::optional<Tensor> query,
                      std::optional<Tensor> key_scale, std::optional<Tensor> key_center,
                      std::optional<Tensor> value_scale, std::optional<Tensor> value_center) {
  check_device(key, "key", kCuda);
  const DeviceScope scope(key);
  const AppendArguments arguments{key,         value,      key_cache,   value_cache,        cache_seqlens,
                                  block_table, rotary_cos, rotary_sin,  rotary_interleaved, query,
                                  key_scale,   key_center, value_scale, value_center};
  const AppendCall call = append_call(arguments, kCuda);
  const auto use = [&](const Tensor& x, const char* name) {
    check_same_gpu(x, name, key, "key");
    scope.uses(x, name);
  };
  const auto use_optional = [&](const std::optional<Tensor>& x, const char* name) {
    if (x) use(*x, name);
  };
  use(key, "key");
  use(value, "value");
  use(key_cache, "key_cache");
  use(value_cache, "value_cache");
  use(cache_seqlens, "cache_seqlens");
  use_optional(block_table, "block_table");
  use_optional(rotary_cos, "rotary_cos");
  use_optional(rotary_sin, "rotary_sin");
  use_optional(query, "query");
  use_optional(key_scale, "key_scale");
  use_optional(key_center, "key_center");
  use_optional(value_scale, "value_scale");
  use_optional(value_center, "value_center");
  begin_writes(arguments);
  scope.makes(call.rotated, "the rotated query");
  check_launch(append_kvcache_cuda(call.params, scope.stream()), "append_kvcache");
  return call.rotated;
}

}  // namespace

FUSEDKV_DEVICE_IMPL(m) {
  m.impl("append_kvcache", TORCH_BOX(&append_kvcache));
}

}  // namespace fusedkv::api
