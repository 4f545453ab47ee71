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

// The first token that the query row at `position` >= 0 sees.
template <typename Int>
FUSEDKV_HOST_DEVICE Int first_visible(Int position, Int left) {
  return left >= 0 && position > left ? position - left : 0;
}

// What the query row at `position` of a sequence of `len` tokens sees. position + right may overflow, the
// difference does not.
template <typename Int>
FUSEDKV_HOST_DEVICE TokenRangeOf<Int> visible_to_row(Int position, Int len, Int left, Int right) {
  if (position < 0) return {0, 0};
  return {first_visible(position, left),
          right >= 0 && len - position > right + 1 ? position + right + 1 : len};
}

// What the last S rows of a sequence see together: the first row has the first token, the last row the last.
template <typename Int>
FUSEDKV_HOST_DEVICE TokenRangeOf<Int> visible_to_any_row(Int len, Int S, Int left) {
  return {first_visible(len > S ? len - S : Int(0), left), len};
}

}  // namespace fusedkv
