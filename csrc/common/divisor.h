// Division by a number that is fixed for a launch, as a multiplication and a shift.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fusedkv {

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31. With 2^(s - 1) < d <= 2^s and m = ceil(2^(31 + s) / d), n m /
// 2^(31 + s) exceeds n / d by less than 1 / d (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t multiplier;
  int shift;
};

inline Divisor divisor(int64_t d) {
  int shift = 31;
  while ((int64_t(1) << (shift - 31)) < d) ++shift;
  return {uint32_t(((uint64_t(1) << shift) + uint64_t(d) - 1) / uint64_t(d)), shift};
}

FUSEDKV_HOST_DEVICE int divide(int n, Divisor d) {
  return int(uint64_t(uint32_t(n)) * d.multiplier >> d.shift);
}

}  // namespace fusedkv
