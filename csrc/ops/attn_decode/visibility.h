// Row s of S is at position len - S + s. It sees token t, 0 <= t < len, if
// position - left <= t <= position + right.
//
// The one place that knows which tokens a query row sees, for the CPU and for CUDA. A negative window is
// unbounded. A row before the first token, position < 0, is fully masked.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fusedkv {

// The tokens [begin, end).
template <typename Int>
struct TokenRangeOf {
  Int begin, end;
};

using TokenRange = TokenRangeOf<int64_t>;

// What the query row at `position` of a sequence of `len` tokens sees.
template <typename Int>
FUSEDKV_HOST_DEVICE TokenRangeOf<Int> visible_to_row(Int position, Int len, Int left, Int right) {
  if (position < 0) return {0, 0};
  return {left >= 0 && position > left ? position - left : 0,
          right >= 0 && len - position > right + 1 ? position + right + 1 : len};
}

// What the last S rows of a sequence see together: the first row has the first token, the last row the last.
template <typename Int>
FUSEDKV_HOST_DEVICE TokenRangeOf<Int> visible_to_any_row(Int len, Int S, Int left) {
  const Int first = len > S ? len - S : 0;
  return {visible_to_row<Int>(first, len, left, -1).begin, len};
}

}  // namespace fusedkv
