// Prints the dynamic shared memory of every decode kernel, "name<arguments> bytes", as the launcher requests it on
// sm_90 for the largest batch that blocks copy the schedule of. ptxas does not report it. ptxas_report.py adds it
// to its table.

#include <cstdio>
#include <initializer_list>

#include "ops/attn_decode/layout.h"

int main() {
  using namespace fusedkv;
  const auto bytes = [](DType dtype, int rows, int dim, int keys, int values, bool coded = false) {
    return attn_launch({dtype, kMaxCopiedBatch, rows, dim, dim, keys, values, true, kSharedBytesSm90, coded})
        .shared_bytes;
  };
  for (int dim : {64, 128, 256}) {
    printf("FallbackKernel<%d> %d\n", dim, bytes(DType::f32, 1, dim, 1, 1));
    printf("CodedKernel<%d> %d\n", dim, bytes(DType::f32, 1, dim, 2, 2, true));  // of two sources each
    for (int keys : {1, 2})
      for (int values : {1, 2}) {
        if (dim < 256 || keys + values == 2)
          printf("MmaWarpKernel<%d, %d, %d> %d\n", dim, keys, values, bytes(DType::bf16, 1, dim, keys, values));
        for (int rows = 16; rows <= max_block_rows(dim, keys, values); rows *= 2)
          printf("MmaBlockKernel<%d, %d, %d, %d> %d\n", dim, keys, values, rows,
                 bytes(DType::bf16, rows, dim, keys, values));
      }
  }
}
