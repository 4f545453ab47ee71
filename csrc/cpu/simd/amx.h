// AMX: eight tile registers of up to 16 rows of 64 bytes, and c += a b on them. One function per instruction.
//
// The compiler's own wrappers do not declare that a tile load reads memory, so that it may drop the stores
// before one. These do.
#pragma once

#include <cstdint>

namespace fusedkv {
namespace FUSEDKV_SIMD_TARGET {

// Rows and bytes per row of each tile register, as ldtilecfg takes them.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows, int64_t bytes) {
    rows[tile] = uint8_t(num_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

static inline void tile_configure(const TileShapes& shapes) {
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

// Without it a thread would carry 8 KB of tiles through every context switch.
static inline void tile_release() {
  __asm__ volatile("tilerelease" ::);
}

template <int kTile>
static inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// stride: bytes from row to row.
template <int kTile>
static inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
static inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// c (M, N) fp32 += a (M, K) bf16 times b, whose rows hold two k of each n: b[k / 2][2 n + k % 2].
template <int kC, int kA, int kB>
static inline void tile_dpbf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace FUSEDKV_SIMD_TARGET
}  // namespace fusedkv
