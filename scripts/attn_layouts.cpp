// Prints the dynamic shared memory of every decode kernel, "name<arguments> bytes", by the functions that the
// launcher asks: ptxas does not know it. ptxas_report.py puts it into its table.

#include <cstdio>
#include <initializer_list>

#include "ops/attn_decode/layout.h"

int main() {
  using namespace fusedkv;
  for (int dim : {64, 128, 256}) {
    printf("GenericKernel<%d> %d\n", dim, generic_layout(dim).shared_bytes);
    const int most = dim == 256 ? 1 : 2;
    for (int keys = 1; keys <= most; ++keys)
      for (int values = 1; values <= most; ++values) {
        printf("WarpKernel<%d, %d, %d> %d\n", dim, keys, values, warp_layout(dim, keys, values).shared_bytes);
        for (int rows : {16, 32, 64})
          printf("RowsKernel<%d, %d, %d, %d> %d\n", dim, keys, values, rows,
                 rows_layout(dim, keys, values, rows).shared_bytes);
      }
  }
}
