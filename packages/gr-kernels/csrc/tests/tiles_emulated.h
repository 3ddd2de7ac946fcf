// The tiles of tiles.h in software, with their checks: what the processor answers with an invalid
// opcode or a protection fault ends the process here. Sums run as the manual says: over k in two
// accumulators of fused products, for the first and the second of each pair, then both are added.
#pragma once

#include <stdint.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace GR_ISA {

struct EmulatedTiles {
  TileConfig config;
  uint8_t data[8][16][64] = {};
};

inline thread_local EmulatedTiles emulated_tiles;

inline void tile_check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline void tiles_configure(const TileConfig* config) {
  EmulatedTiles& t = emulated_tiles;
  tile_check(config->palette == 1 && config->start_row == 0, "palette 1, first row 0 expected");
  for (uint8_t byte : config->reserved) tile_check(byte == 0, "a reserved byte is set");
  for (int i = 0; i < 16; ++i) {
    const int rows = config->rows[i], bytes = config->row_bytes[i];
    tile_check(rows <= 16 && bytes <= 64, "a tile is too large");
    tile_check((rows == 0) == (bytes == 0), "a tile has rows or bytes alone");
    tile_check(i < 8 || rows == 0, "there are 8 tiles");
  }
  t.config = *config;
  std::memset(t.data, 0, sizeof t.data);
}

inline void tiles_release() { emulated_tiles = EmulatedTiles(); }

inline void tile_expect(int tile) {
  const TileConfig& config = emulated_tiles.config;
  tile_check(config.palette == 1, "not configured");
  tile_check(config.rows[tile] != 0 && config.row_bytes[tile] % 4 == 0, "no such tile");
}

template <int kTile>
inline void tile_zero() {
  tile_expect(kTile);
  std::memset(emulated_tiles.data[kTile], 0, sizeof emulated_tiles.data[kTile]);
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  tile_expect(kTile);
  EmulatedTiles& t = emulated_tiles;
  std::memset(t.data[kTile], 0, sizeof t.data[kTile]);
  for (int r = 0; r < t.config.rows[kTile]; ++r) {
    std::memcpy(t.data[kTile][r], (const uint8_t*)from + r * stride, t.config.row_bytes[kTile]);
  }
}

template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  tile_expect(kTile);
  EmulatedTiles& t = emulated_tiles;
  for (int r = 0; r < t.config.rows[kTile]; ++r) {
    std::memcpy((uint8_t*)to + r * stride, t.data[kTile][r], t.config.row_bytes[kTile]);
  }
}

inline float tile_float(uint32_t bits) {
  // What is below the least normal number counts as zero.
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float tile_flush(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return tile_float(bits);
}

template <int kC, int kA, int kB>
inline void tile_dot() {
  static_assert(kC != kA && kC != kB && kA != kB, "three different tiles");
  tile_expect(kC);
  tile_expect(kA);
  tile_expect(kB);
  EmulatedTiles& t = emulated_tiles;
  const TileConfig& config = t.config;
  const int rows = config.rows[kC], columns = config.row_bytes[kC] / 4, depth = config.rows[kB];
  tile_check(config.row_bytes[kB] == config.row_bytes[kC], "columns of b and c differ");
  tile_check(config.rows[kA] == rows, "rows of a and c differ");
  tile_check(config.row_bytes[kA] / 4 == depth, "depths of a and b differ");
  for (int r = 0; r < rows; ++r) {
    float first[16] = {}, second[16] = {};
    for (int k = 0; k < depth; ++k) {
      uint32_t a, b;
      std::memcpy(&a, &t.data[kA][r][4 * k], 4);
      const float low = tile_float(a << 16), high = tile_float(a & 0xffff0000u);
      for (int n = 0; n < columns; ++n) {
        std::memcpy(&b, &t.data[kB][k][4 * n], 4);
        first[n] = tile_flush(std::fma(low, tile_float(b << 16), first[n]));
        second[n] = tile_flush(std::fma(high, tile_float(b & 0xffff0000u), second[n]));
      }
    }
    for (int n = 0; n < columns; ++n) {
      float c;
      std::memcpy(&c, &t.data[kC][r][4 * n], 4);
      c = tile_flush(tile_flush(c) + tile_flush(first[n] + second[n]));
      std::memcpy(&t.data[kC][r][4 * n], &c, 4);
    }
  }
}

}  // namespace GR_ISA
