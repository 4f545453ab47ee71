// Limits of all operations.
#pragma once

#include <cstdint>

namespace fusedkv {

// Sources of a key or a value.
constexpr int kMaxSources = 32;

// Head dims of fuse_kv and of cached attention: multiples of 8 up to this.
constexpr int64_t kMaxHeadDim = 256;

}  // namespace fusedkv
