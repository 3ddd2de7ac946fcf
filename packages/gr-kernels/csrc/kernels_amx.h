// Products on the tiles of AMX; norms, gates and all else as with AVX-512. Memory is packed as for
// AVX-512's bfloat16: 16 pairs of k of 16 columns, 1 KiB, are a tile.
//
// Tiles 0 to 3 hold sums, 2 x 2 of them or 1 x 4, 4 and 5 rows, 6 and 7 columns. Both shapes take as
// many loads of tiles as the products leave time for, and keep as many chains of products as it
// takes to hide how long each one lasts. A last tile of rows begins where it ends with the last row,
// over rows that the one before has too; so all tiles have min(count, 16) rows, and one
// configuration serves a whole piece of work. A product's order of sums is the same for all rows.
#pragma once

#include <type_traits>

#include "kernels_impl.h"
#include "tiles.h"

namespace GR_ISA {

typedef Bf16::E E;

constexpr int kTileK = 32;                  // elements of k in a tile
constexpr int kTileSize = 16 * kTileK;      // elements of a tile
constexpr int kBlocks = 4;                  // blocks of keys between two visits of the sums
constexpr int kKeys = kBlocks * kBlockTokens;

static inline int tile_rows(int count) { return count < 16 ? count : 16; }
static inline int tile_count(int count) { return (count + 15) / 16; }
static inline int tile_first(int count, int tile) {
  return count < 16 || 16 * tile + 16 <= count ? 16 * tile : count - 16;
}

// The configurations for 0 to 16 rows.
struct TileConfigs {
  TileConfig of[17];
  constexpr TileConfigs() : of() {
    for (int rows = 1; rows <= 16; ++rows) {
      of[rows].palette = 1;
      for (int i = 0; i < 8; ++i) {
        of[rows].row_bytes[i] = 64;
        of[rows].rows[i] = (uint8_t)(i < 6 ? rows : 16);
      }
    }
  }
};
constexpr TileConfigs kTileConfigs;

static void begin(int32_t count) { tiles_configure(&kTileConfigs.of[tile_rows(count)]); }

static void end() { tiles_release(); }

// Memory of one worker, on the heap: too much for the stack of somebody else's thread.
struct Scratch {
  float* results;  // (32, 64)
  E* a_tail;       // 2 tiles of rows, their last k
  E* b_tail;       // 4 tiles of columns
  E* q;            // (tiles of rows, tiles of k) of one head
  E* p;            // (kRows, kKeys) activated scores
  E* v_tail;       // V of the last block of a head, zero from token N on

  Scratch(void* base, const Shape& s) {
    results = (float*)base;
    a_tail = (E*)(results + 32 * 64);
    b_tail = a_tail + 2 * kTileSize;
    p = b_tail + 4 * kTileSize;
    q = p + gr::kRows * kKeys;
    v_tail = q + gr::kRows * q_columns(s);
  }
  static int q_columns(const Shape& s) { return (s.d_qk + kTileK - 1) / kTileK * kTileK; }
  static int64_t bytes(const Shape* s) {
    const Scratch none(nullptr, *s);
    return (int64_t)(none.v_tail + (int64_t)s->d_v_padded * kBlockTokens);
  }
};

static inline __mmask32 first_lanes(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// `rows` rows of n <= 32 elements as a tile of rows, zero beyond n.
static inline void pad_rows(E* tile, const E* from, int64_t stride, int rows, int n) {
  const __mmask32 mask = first_lanes(n);
  for (int r = 0; r < rows; ++r) {
    _mm512_store_si512(tile + r * kTileK, _mm512_maskz_loadu_epi16(mask, from + r * stride));
  }
}

// The first n <= 32 k of a tile of columns, zero beyond.
static inline void pad_columns(E* tile, const E* from, int n) {
  for (int pair = 0; pair < 16; ++pair) {
    const int k = n - 2 * pair;
    const __mmask32 mask = k >= 2 ? ~0u : k == 1 ? 0x55555555u : 0;
    _mm512_store_si512(tile + pair * 32, _mm512_maskz_loadu_epi16(mask, from + pair * 32));
  }
}

template <int RT, int J>
static inline __attribute__((always_inline)) void dot_column(const E* b) {
  tile_load<6 + J % 2>(b, 64);
  tile_dot<J, 4, 6 + J % 2>();
  if constexpr (RT == 2) tile_dot<2 + J, 5, 6 + J % 2>();
}

// Sums (r, j) in tile 2r + j, over `steps` tiles of k. `stride` in bytes, `step` in elements.
template <int RT, int NB>
static inline __attribute__((always_inline)) void dot(const E* a0, const E* a1, int64_t stride,
                                                      int64_t step, const E* const (&b)[4],
                                                      int64_t steps) {
  static_assert(RT == 1 || NB <= 2, "four sums");
  for (int64_t k = 0; k < steps; ++k) {
    tile_load<4>(a0 + k * step, stride);
    if constexpr (RT == 2) tile_load<5>(a1 + k * step, stride);
    dot_column<RT, 0>(b[0] + k * kTileSize);
    if constexpr (NB > 1) dot_column<RT, 1>(b[1] + k * kTileSize);
    if constexpr (NB > 2) dot_column<RT, 2>(b[2] + k * kTileSize);
    if constexpr (NB > 3) dot_column<RT, 3>(b[3] + k * kTileSize);
  }
}

template <int RT, int NB, class Do>
static inline __attribute__((always_inline)) void each_sum(Do&& what) {
  using std::integral_constant;
  what(integral_constant<int, 0>(), 0, 0);
  if constexpr (NB > 1) what(integral_constant<int, 1>(), 0, 1);
  if constexpr (NB > 2) what(integral_constant<int, 2>(), 0, 2);
  if constexpr (NB > 3) what(integral_constant<int, 3>(), 0, 3);
  if constexpr (RT == 2) what(integral_constant<int, 2>(), 1, 0);
  if constexpr (RT == 2 && NB > 1) what(integral_constant<int, 3>(), 1, 1);
}

template <int RT, int NB>
static inline void zero_sums() {
  each_sum<RT, NB>([](auto tile, int, int) { tile_zero<decltype(tile)::value>(); });
}

// Sum (r, j) from or to row 16r, column 16j of a matrix with so many columns.
template <int RT, int NB>
static inline void load_sums(const float* from, int64_t columns) {
  each_sum<RT, NB>([=](auto tile, int r, int j) {
    tile_load<decltype(tile)::value>(from + 16 * r * columns + 16 * j, 4 * columns);
  });
}

template <int RT, int NB>
static inline void store_sums(float* to, int64_t columns) {
  each_sum<RT, NB>([=](auto tile, int r, int j) {
    tile_store<decltype(tile)::value>(to + 16 * r * columns + 16 * j, 4 * columns);
  });
}

// ── Linear ──────────────────────────────────────────────────────────────────────────────────

template <int RT, int NB>
static void linear_sums(const Linear& w, const Scratch& scratch, const E* a0, const E* a1,
                        int group) {
  const E* weight = (const E*)w.panel->weight;
  const int64_t whole = w.depth / 16;
  const E *b[4] = {}, *tail[4] = {};
  for (int j = 0; j < NB; ++j) {
    b[j] = weight + (group + j) * w.depth * 32;
    tail[j] = scratch.b_tail + (group + j) * kTileSize;
  }
  zero_sums<RT, NB>();
  dot<RT, NB>(a0, a1, 2 * w.stride, kTileK, b, whole);
  if (w.depth % 16) {
    dot<RT, NB>(scratch.a_tail, scratch.a_tail + kTileSize, 64, kTileSize, tail, 1);
  }
  store_sums<RT, NB>(scratch.results + 16 * group, 64);
}

template <int RT>
static void linear_rows(const Linear& w, const Scratch& scratch, int tile) {
  const Panel& p = *w.panel;
  const int64_t whole = w.depth / 16;
  const int tail = 2 * (int)(w.depth % 16);
  const E* a[2] = {};
  for (int r = 0; r < RT; ++r) {
    a[r] = (const E*)w.rows + tile_first(w.count, tile + r) * w.stride;
    if (tail) {
      pad_rows(scratch.a_tail + r * kTileSize, a[r] + whole * kTileK, w.stride, tile_rows(w.count),
               tail);
    }
  }
  if constexpr (RT == 2) {
    for (int group = 0; group < p.groups; group += 2) {
      if (group + 1 < p.groups) {
        linear_sums<2, 2>(w, scratch, a[0], a[1], group);
      } else {
        linear_sums<2, 1>(w, scratch, a[0], a[1], group);
      }
    }
  } else {
    switch (p.groups) {
      case 1: linear_sums<1, 1>(w, scratch, a[0], a[1], 0); break;
      case 2: linear_sums<1, 2>(w, scratch, a[0], a[1], 0); break;
      case 3: linear_sums<1, 3>(w, scratch, a[0], a[1], 0); break;
      default: linear_sums<1, 4>(w, scratch, a[0], a[1], 0); break;
    }
  }
  for (int r = 0; r < RT; ++r) {
    const int first = 16 * (tile + r);
    const int rows = w.count - first < 16 ? w.count - first : 16;
    float(*results)[64] = (float(*)[64])scratch.results + 16 * r + first -
                          tile_first(w.count, tile + r);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < p.groups; ++j) {
        float* at = results[i] + j * kGroup;
        F y = f_load(at);
        if (p.bias) y = f_add(y, f_load(p.bias + j * kGroup));
        if (p.silu) y = silu<true>(y);
        f_store(at, f_mul(y, f_set1(p.scale)));
      }
    }
    place<Bf16>(w, first, rows, results);
  }
}

static void linear_amx(const Linear* work) {
  const Linear& w = *work;
  const Scratch scratch(w.scratch, *w.shape);
  const int64_t whole = w.depth / 16;
  const int tail = 2 * (int)(w.depth % 16);
  if (tail) {
    const E* weight = (const E*)w.panel->weight;
    for (int j = 0; j < w.panel->groups; ++j) {
      // Only pairs that are there may be read.
      E* target = scratch.b_tail + j * kTileSize;
      const E* from = weight + j * w.depth * 32 + whole * kTileSize;
      __builtin_memset(target, 0, 2 * kTileSize);
      __builtin_memcpy(target, from, 32 * tail);
    }
  }
  const int tiles = tile_count(w.count);
  int tile = 0;
  for (; tile + 1 < tiles; tile += 2) linear_rows<2>(w, scratch, tile);
  if (tile < tiles) linear_rows<1>(w, scratch, tile);
}

// ── Attention ───────────────────────────────────────────────────────────────────────────────

// A block of keys as some rows see it.
struct Seen {
  int place;   // among the blocks between two visits of the sums
  int key;     // its first
  const E* k;
  const E* v;
  bool whole;  // seen by all rows, all of it
};

// Scores of RT tiles of rows with NB / 2 blocks, activated, into p.
template <int RT, int NB>
static void score(const Attend& w, const Scratch& scratch, int tile, const Seen* seen) {
  const Shape& s = *w.shape;
  const int columns = Scratch::q_columns(s), tail = s.d_qk_padded % kTileK;
  const int whole = s.d_qk_padded / kTileK;
  const E *k[4] = {}, *k_tail[4] = {};
  for (int j = 0; j < NB; ++j) {
    k[j] = seen[j / 2].k + (j % 2) * (int64_t)s.d_qk_padded * kGroup;
    if (tail) {
      E* target = scratch.b_tail + j * kTileSize;
      // What follows belongs to other keys, and may be NaN.
      __builtin_memset(target, 0, 2 * kTileSize);
      __builtin_memcpy(target, k[j] + whole * kTileSize, 32 * tail);
      k_tail[j] = target;
    }
  }
  const E* q0 = scratch.q + tile * 16 * columns;
  const E* q1 = q0 + 16 * columns;
  zero_sums<RT, NB>();
  dot<RT, NB>(q0, q1, 64, kTileSize, k, whole);
  if (tail) {
    dot<RT, NB>(q0 + whole * kTileSize, q1 + whole * kTileSize, 64, kTileSize, k_tail, 1);
  }
  store_sums<RT, NB>(scratch.results, NB * 16);
  const int rows = tile_rows(w.count);
  for (int r = 0; r < RT; ++r) {
    const int first = tile_first(w.count, tile + r);
    for (int i = 0; i < rows; ++i) {
      const float* sums = scratch.results + (16 * r + i) * NB * 16;
      E* p = scratch.p + (16 * (tile + r) + i) * kKeys;
      const int row = first + i;
      for (int j = 0; j < NB; ++j) {
        const Seen& block = seen[j / 2];
        const int key = block.key + j % 2 * kGroup;
        F x = f_load(sums + j * kGroup);
        if (w.bias) x = f_add(x, f_load(w.bias + row * w.bias_stride + key));
        F y = silu<Bf16::kPrecise>(x);
        if (!block.whole) y = f_keep(lanes(w.low[row] - key, w.high[row] - key), y);
        Bf16::store(p + block.place * kBlockTokens + j % 2 * kGroup, y);
      }
    }
  }
}

// Adds the blocks' values to NB groups of columns of the sums.
template <int RT, int NB>
static void add_values(const Attend& w, const Scratch& scratch, int tile, int column,
                       const Seen* seen, int count) {
  const int64_t width = w.shape->d_v_padded;
  float* sums = w.sums + 16 * tile * width + column;
  load_sums<RT, NB>(sums, width);
  const E* p = scratch.p + 16 * tile * kKeys;
  for (int i = 0; i < count; ++i) {
    const E* v[4] = {};
    for (int j = 0; j < NB; ++j) v[j] = seen[i].v + (column + j * kGroup) * kBlockTokens;
    const E* rows = p + seen[i].place * kBlockTokens;
    dot<RT, NB>(rows, rows + 16 * kKeys, 2 * kKeys, 0, v, 1);
  }
  store_sums<RT, NB>(sums, width);
}

template <int RT>
static void attend_rows(const Attend& w, const Scratch& scratch, int tile, const Seen* blocks,
                        int count) {
  const int begin_row = tile_first(w.count, tile);
  const int end_row = tile_first(w.count, tile + RT - 1) + tile_rows(w.count);
  Seen seen[kBlocks];
  int n = 0;
  for (int i = 0; i < count; ++i) {
    bool any = false, all = true;
    const int key = blocks[i].key;
    for (int r = begin_row; r < end_row; ++r) {
      any |= w.low[r] < w.high[r] && w.low[r] < key + kBlockTokens && w.high[r] > key;
      all &= w.low[r] <= key && w.high[r] >= key + kBlockTokens;
    }
    if (!any) continue;
    seen[n] = blocks[i];
    seen[n++].whole = all;
  }
  if (!n) return;
  constexpr int kAtOnce = RT == 2 ? 1 : 2;
  int i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) score<RT, 2 * kAtOnce>(w, scratch, tile, seen + i);
  if (i < n) score<RT, 2>(w, scratch, tile, seen + i);
  constexpr int kGroups = RT == 2 ? 2 : 4;
  const int width = w.shape->d_v_padded;
  int c = 0;
  for (; c + kGroups * kGroup <= width; c += kGroups * kGroup) {
    add_values<RT, kGroups>(w, scratch, tile, c, seen, n);
  }
  const int left = (width - c) / kGroup;
  if (left == 1) add_values<RT, 1>(w, scratch, tile, c, seen, n);
  if constexpr (RT == 1) {
    if (left == 2) add_values<1, 2>(w, scratch, tile, c, seen, n);
    if (left == 3) add_values<1, 3>(w, scratch, tile, c, seen, n);
  }
}

static void attend_amx(const Attend* work) {
  const Attend& w = *work;
  const Shape& s = *w.shape;
  const Scratch scratch(w.scores, s);
  const int tiles = tile_count(w.count), rows = tile_rows(w.count);
  const int columns = Scratch::q_columns(s), width = s.d_v_padded;
  int begin = w.keys, end = 0;
  for (int r = 0; r < w.count; ++r) {
    if (w.low[r] < w.high[r]) {
      begin = w.low[r] < begin ? w.low[r] : begin;
      end = w.high[r] > end ? w.high[r] : end;
    }
  }
  for (int head = 0; head < s.heads; ++head) {
    const int64_t stride = (int64_t)s.heads * s.d_qk_padded;
    for (int tile = 0; tile < tiles; ++tile) {
      const E* q = (const E*)w.q + tile_first(w.count, tile) * stride + head * s.d_qk_padded;
      for (int k = 0; k < s.d_qk_padded; k += kTileK) {
        pad_rows(scratch.q + tile * 16 * columns + 16 * k, q + k, stride, rows, s.d_qk_padded - k);
      }
    }
    // All of it, overlapping rows too.
    for (int i = 0; i < 16 * tiles * width; i += kGroup) f_store(w.sums + i, f_zero());
    for (int key = begin / kBlockTokens * kBlockTokens; key < end; key += kKeys) {
      Seen blocks[kBlocks];
      int count = 0;
      for (; count < kBlocks && key + count * kBlockTokens < end; ++count) {
        Seen& block = blocks[count];
        block.place = count;
        block.key = key + count * kBlockTokens;
        const uint8_t* at = w.blocks[block.key / kBlockTokens] + w.layer_offset;
        block.k = (const E*)(at + head * s.k_head_bytes);
        block.v = (const E*)(at + s.heads * s.k_head_bytes + head * s.v_head_bytes);
        const int real = w.keys - block.key;
        if (real < kBlockTokens) {
          for (int c = 0; c < width; c += kGroup) {
            pad_columns(scratch.v_tail + c * kBlockTokens, block.v + c * kBlockTokens, real);
          }
          block.v = scratch.v_tail;
        }
      }
      int tile = 0;
      for (; tile + 1 < tiles; tile += 2) attend_rows<2>(w, scratch, tile, blocks, count);
      if (tile < tiles) attend_rows<1>(w, scratch, tile, blocks, count);
    }
    const int last = 16 * (tiles - 1), overlap = last - tile_first(w.count, tiles - 1);
    if (overlap) {
      __builtin_memmove(w.sums + (int64_t)last * width, w.sums + (int64_t)(last + overlap) * width,
                        4 * (int64_t)(w.count - last) * width);
    }
    finish_head<Bf16>(w, head);
  }
}

}  // namespace GR_ISA
