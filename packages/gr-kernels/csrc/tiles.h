// Intel AMX's tiles, named by number: 16 rows of 64 bytes each, or less as configured.
//
// In assembly, because the intrinsics of GCC do not say that they read memory: stores to a panel
// may then sink below the load of its tile.
#pragma once

#include <stdint.h>

namespace GR_ISA {

// What the instruction reads; palette 1 has 8 tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 0;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace GR_ISA

#ifdef GR_TILES_EMULATED
#include "tests/tiles_emulated.h"
#else

namespace GR_ISA {

static inline void tiles_configure(const TileConfig* config) {
  asm volatile("ldtilecfg %0" ::"m"(*config) : "memory");
}
static inline void tiles_release() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// `stride` in bytes.
template <int kTile>
static inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
static inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// c += a·b, of bfloat16 pairs: a is (rows, 32), b is (16, 16, 2), c is (rows, 16) float32.
template <int kC, int kA, int kB>
static inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace GR_ISA

#endif
