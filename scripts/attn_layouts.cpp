// Prints the dynamic shared memory of every decode kernel, "name<arguments> bytes", from the functions that the
// launcher uses. ptxas does not report it. ptxas_report.py adds it to its table.

#include <cstdio>
#include <initializer_list>

#include "ops/attn_decode/layout.h"

int main() {
  using namespace fusedkv;
  for (int dim : {64, 128, 256}) {
    printf("FallbackKernel<%d> %d\n", dim, fallback_layout(dim).shared_bytes);
    const int most = dim == 256 ? 1 : 2;
    for (int keys = 1; keys <= most; ++keys)
      for (int values = 1; values <= most; ++values) {
        printf("MmaWarpKernel<%d, %d, %d> %d\n", dim, keys, values, mma_warp_layout(dim, keys, values).shared_bytes);
        for (int rows : {16, 32, 64})
          printf("MmaBlockKernel<%d, %d, %d, %d> %d\n", dim, keys, values, rows,
                 mma_block_layout(dim, keys, values, rows).shared_bytes);
      }
  }
}
