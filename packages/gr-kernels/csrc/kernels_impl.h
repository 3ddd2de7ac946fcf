// The kernels, for one instruction set and one precision at a time.
//
// Every sum runs in one order, whatever the number of rows: over k from the first to the last, over
// keys likewise, so that a row's bits depend on nothing but what it reads.
#pragma once

#include "kernels.h"

namespace GR_ISA {

using gr::Attend;
using gr::kBlockTokens;
using gr::kChunk;
using gr::kGroup;
using gr::Linear;
using gr::Norm;
using gr::Panel;
using gr::RowPlace;
using gr::Section;
using gr::Shape;

constexpr int kTileRows = 6;

template <class P, int MR, int NV>
static inline __attribute__((always_inline)) void multiply(F (&acc)[MR][NV],
                                                           const typename P::E* a, int64_t stride,
                                                           const typename P::E* const (&b)[NV],
                                                           int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    typename P::B column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = P::load_b(b[j] + k * kGroup * P::kStep);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        acc[r][j] = P::madd(acc[r][j], a + r * stride + k * P::kStep, column[j]);
      }
    }
  }
}

// ── Linear ──────────────────────────────────────────────────────────────────────────────────

template <class P>
static inline void store_row(typename P::E* target, const float* values, int d, int padded) {
  for (int c = 0; c < padded; c += kGroup) {
    const int n = d - c;
    const F x = n >= kGroup ? f_load(values + c) : f_load_n(values + c, n > 0 ? n : 0);
    if (c + kGroup <= padded) {
      P::store(target + c, x);
    } else {
      typename P::E part[kGroup];
      P::store(part, x);
      for (int i = 0; c + i < padded; ++i) target[c + i] = part[i];
    }
  }
}

// Columns of one head of a row's query, from `column` on; zeros fill the head's last step.
template <class P>
static inline void place_query(const Shape& s, const float* values, int head, int column,
                               int columns, typename P::E* q) {
  store_row<P>(q + (int64_t)head * s.d_qk_padded + column, values, columns,
               column + columns == s.d_qk ? s.d_qk_padded - column : columns);
}

// The same of its key: into the block, (d_qk_padded / step, 16, step) for each group of 16 tokens,
// and to the own keys.
template <class P>
static inline void place_key(const Shape& s, const float* values, int head, int column,
                             int columns, const RowPlace& at, int64_t layer_offset, void* own_k) {
  typedef typename P::E E;
  const int padded = column + columns == s.d_qk ? s.d_qk_padded - column : columns;
  if (at.block) {
    E* group = (E*)(at.block + layer_offset + head * s.k_head_bytes) +
               (at.slot / kGroup) * (int64_t)s.d_qk_padded * kGroup + (int64_t)column * kGroup +
               (at.slot % kGroup) * P::kStep;
    E row[64 + kGroup];
    store_row<P>(row, values, columns, padded);
    for (int c = 0; c < padded; c += P::kStep) {
      __builtin_memcpy(group + c * kGroup, row + c, sizeof(E) * P::kStep);
    }
  }
  if (at.own >= 0) {
    store_row<P>((E*)own_k + ((int64_t)at.own * s.heads + head) * s.d_qk_padded + column, values,
                 columns, padded);
  }
}

// And of its value: (tokens / step, 16, step) for each group of 16 columns.
template <class P>
static inline void place_value(const Shape& s, const float* values, int head, int column,
                               int columns, const RowPlace& at, int64_t layer_offset,
                               void* own_v) {
  typedef typename P::E E;
  const int padded = (columns + kGroup - 1) / kGroup * kGroup;
  if (at.block) {
    E* target = (E*)(at.block + layer_offset + s.heads * s.k_head_bytes + head * s.v_head_bytes) +
                (int64_t)column * kBlockTokens + (at.slot / P::kStep) * kGroup * P::kStep;
    for (int c = 0; c < padded; c += kGroup) {
      const F x = columns - c >= kGroup ? f_load(values + c) : f_load_n(values + c, columns - c);
      P::store_spread(target + (int64_t)c * kBlockTokens, at.slot % P::kStep, x);
    }
  }
  if (at.own >= 0) {
    store_row<P>((E*)own_v + ((int64_t)at.own * s.heads + head) * s.d_v_padded + column, values,
                 columns, padded);
  }
}

// What a tile of results becomes: rows of up to 64 columns in `tile`.
template <class P>
static void place(const Linear& w, int first, int rows, const float (*tile)[64]) {
  typedef typename P::E E;
  const Shape& s = *w.shape;
  const Panel& p = *w.panel;
  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    const float* values = tile[r];
    switch (p.section) {
      case Section::kU:
        __builtin_memcpy(w.u + row * s.heads * s.d_v + p.column, values, 4 * p.columns);
        break;
      case Section::kQ:
        place_query<P>(s, values, p.head, p.column, p.columns,
                       (E*)w.q + row * s.heads * s.d_qk_padded);
        break;
      case Section::kK:
        place_key<P>(s, values, p.head, p.column, p.columns, w.places[row], w.layer_offset,
                     w.own_k);
        break;
      case Section::kV:
        place_value<P>(s, values, p.head, p.column, p.columns, w.places[row], w.layer_offset,
                       w.own_v);
        break;
      case Section::kOutput: {
        float* x = w.x + row * s.d_model + p.column;
        int c = 0;
        for (; c + kGroup <= p.columns; c += kGroup) {
          f_store(x + c, f_add(f_load(x + c), f_load(values + c)));
        }
        if (c < p.columns) {
          const int n = p.columns - c;
          f_store_n(x + c, f_add(f_load_n(x + c, n), f_load_n(values + c, n)), n);
        }
        break;
      }
    }
  }
}

// A token that comes as it is, for attention without a projection before it.
template <class P>
static void place_token(const Shape* shape, const float* q, float scale, const float* k,
                        const float* v, const RowPlace* at, void* q_row, void* own_k,
                        void* own_v) {
  const Shape& s = *shape;
  for (int h = 0; h < s.heads; ++h) {
    for (int c = 0; c < s.d_qk; c += 64) {
      const int n = s.d_qk - c < 64 ? s.d_qk - c : 64;
      if (q) {
        float scaled[64];
        for (int i = 0; i < n; ++i) scaled[i] = q[h * s.d_qk + c + i] * scale;
        place_query<P>(s, scaled, h, c, n, (typename P::E*)q_row);
      }
      if (k) place_key<P>(s, k + h * s.d_qk + c, h, c, n, *at, 0, own_k);
    }
    for (int c = 0; v && c < s.d_v; c += 64) {
      const int n = s.d_v - c < 64 ? s.d_v - c : 64;
      place_value<P>(s, v + h * s.d_v + c, h, c, n, *at, 0, own_v);
    }
  }
}

template <class P, int MR, int NV>
static __attribute__((noinline)) void linear_tile(const Linear& w, int first) {
  typedef typename P::E E;
  const Panel& p = *w.panel;
  const E* b[NV];
  for (int j = 0; j < NV; ++j) b[j] = (const E*)p.weight + j * w.depth * kGroup * P::kStep;
  F acc[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) acc[r][j] = f_zero();
  }
  multiply<P, MR, NV>(acc, (const E*)w.rows + first * w.stride, w.stride, b, 0, w.depth);
  float tile[MR][64];
  for (int j = 0; j < NV; ++j) {
    const F bias = p.bias ? f_load(p.bias + j * kGroup) : f_zero();
    const F scale = f_set1(p.scale);
    for (int r = 0; r < MR; ++r) {
      F y = f_add(acc[r][j], bias);
      if (p.silu) y = silu<true>(y);
      f_store(tile[r] + j * kGroup, f_mul(y, scale));
    }
  }
  place<P>(w, first, MR, tile);
}

template <class P, int NV>
static void linear_panel(const Linear& w) {
  int r = 0;
  for (; r + kTileRows <= w.count; r += kTileRows) linear_tile<P, kTileRows, NV>(w, r);
  switch (w.count - r) {
    case 1: linear_tile<P, 1, NV>(w, r); break;
    case 2: linear_tile<P, 2, NV>(w, r); break;
    case 3: linear_tile<P, 3, NV>(w, r); break;
    case 4: linear_tile<P, 4, NV>(w, r); break;
    case 5: linear_tile<P, 5, NV>(w, r); break;
  }
}

template <class P>
static void linear(const Linear* w) {
  switch (w->panel->groups) {
    case 1: linear_panel<P, 1>(*w); break;
    case 2: linear_panel<P, 2>(*w); break;
    case 3: linear_panel<P, 3>(*w); break;
    default: linear_panel<P, 4>(*w); break;
  }
}

// ── Attention ───────────────────────────────────────────────────────────────────────────────

static inline uint32_t lanes(int low, int high) {
  low = low < 0 ? 0 : low > 16 ? 16 : low;
  high = high < 0 ? 0 : high > 16 ? 16 : high;
  return ((1u << high) - 1) & ~((1u << low) - 1);
}

// Scores of MR rows with NV groups of keys, activated, into `scores`.
template <class P, int MR, int NV, bool kMasked>
static inline __attribute__((always_inline)) void score_tile(
    const Attend& w, int head, int first, int key, const typename P::E* const (&b)[NV]) {
  typedef typename P::E E;
  const Shape& s = *w.shape;
  const int64_t stride = (int64_t)s.heads * s.d_qk_padded;
  F acc[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = w.bias ? f_load(w.bias + (first + r) * w.bias_stride + key + j * kGroup)
                         : f_zero();
    }
  }
  multiply<P, MR, NV>(acc, (const E*)w.q + first * stride + head * s.d_qk_padded, stride, b, 0,
                      s.d_qk_padded / P::kStep);
  E* scores = (E*)w.scores + (int64_t)first * kChunk;
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) {
      F y = silu<P::kPrecise>(acc[r][j]);
      if (kMasked) {
        const int base = key + j * kGroup;
        y = f_keep(lanes(w.low[first + r] - base, w.high[first + r] - base), y);
      }
      P::store(scores + r * kChunk + j * kGroup, y);
    }
  }
}

template <class P, int MR, bool kMasked>
static __attribute__((noinline)) void score_rows(const Attend& w, int head, int first, int key,
                                                 const typename P::E* const* b, int groups) {
  typedef typename P::E E;
  switch (groups) {
    case 1: { const E* const c[1] = {b[0]}; score_tile<P, MR, 1, kMasked>(w, head, first, key, c); break; }
    case 2: { const E* const c[2] = {b[0], b[1]}; score_tile<P, MR, 2, kMasked>(w, head, first, key, c); break; }
    case 3: { const E* const c[3] = {b[0], b[1], b[2]}; score_tile<P, MR, 3, kMasked>(w, head, first, key, c); break; }
    default: { const E* const c[4] = {b[0], b[1], b[2], b[3]}; score_tile<P, MR, 4, kMasked>(w, head, first, key, c); break; }
  }
}

// Adds the scored keys' values to the sums of MR rows, NV groups of columns.
template <class P, int MR, int NV>
static inline __attribute__((always_inline)) void value_tile(const Attend& w, int first, int column,
                                                             const typename P::E* v0,
                                                             const typename P::E* v1, int keys) {
  typedef typename P::E E;
  const Shape& s = *w.shape;
  F acc[MR][NV];
  float* sums = w.sums + (int64_t)first * s.d_v_padded + column;
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) acc[r][j] = f_load(sums + r * s.d_v_padded + j * kGroup);
  }
  const E* scores = (const E*)w.scores + (int64_t)first * kChunk;
  for (int part = 0; part < 2; ++part) {
    const int n = keys - part * kBlockTokens;
    if (n <= 0) break;
    const E* v = part ? v1 : v0;
    const E* b[NV];
    for (int j = 0; j < NV; ++j) b[j] = v + (int64_t)(column + j * kGroup) * kBlockTokens;
    const E* a = scores + part * kBlockTokens;
    const int whole = (n < kBlockTokens ? n : kBlockTokens) / P::kStep;
    multiply<P, MR, NV>(acc, a, kChunk, (const E* const(&)[NV])b, 0, whole);
    if (n < kBlockTokens && n % P::kStep) {
      for (int j = 0; j < NV; ++j) {
        const typename P::B last = P::load_b_first(b[j] + whole * kGroup * P::kStep);
        for (int r = 0; r < MR; ++r) {
          acc[r][j] = P::madd(acc[r][j], a + r * kChunk + whole * P::kStep, last);
        }
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) f_store(sums + r * s.d_v_padded + j * kGroup, acc[r][j]);
  }
}

template <class P, int MR>
static __attribute__((noinline)) void value_rows(const Attend& w, int first,
                                                 const typename P::E* v0,
                                                 const typename P::E* v1, int keys) {
  const int width = w.shape->d_v_padded;
  int c = 0;
  for (; c + 64 <= width; c += 64) value_tile<P, MR, 4>(w, first, c, v0, v1, keys);
  switch ((width - c) / kGroup) {
    case 1: value_tile<P, MR, 1>(w, first, c, v0, v1, keys); break;
    case 2: value_tile<P, MR, 2>(w, first, c, v0, v1, keys); break;
    case 3: value_tile<P, MR, 3>(w, first, c, v0, v1, keys); break;
  }
}

template <class P, int MR>
static void chunk_rows(const Attend& w, int head, int first, int key, int keys,
                       const typename P::E* const* b, const typename P::E* v0,
                       const typename P::E* v1) {
  bool all = keys % kGroup == 0;
  int seen = 0;  // keys of the chunk up to the last one that any of the rows sees
  for (int r = first; r < first + MR; ++r) {
    const int low = w.low[r] - key;
    const int high = w.high[r] - key < keys ? w.high[r] - key : keys;
    if (low < high && high > seen) seen = high;
    all &= low <= 0 && high == keys;
  }
  if (seen == 0) return;
  const int groups = (seen + kGroup - 1) / kGroup;
  if (all) {
    score_rows<P, MR, false>(w, head, first, key, b, groups);
  } else {
    score_rows<P, MR, true>(w, head, first, key, b, groups);
  }
  // A key that a row does not see adds an exact zero; so leaving some out changes no bit.
  const int read = seen + (seen & (P::kStep - 1));
  value_rows<P, MR>(w, first, v0, v1, read < keys ? read : keys);
}

template <class P>
static void own_key(const Attend& w, int head, int row) {
  typedef typename P::E E;
  const Shape& s = *w.shape;
  const int own = w.places[row].own;
  const E* q = (const E*)w.q + ((int64_t)row * s.heads + head) * s.d_qk_padded;
  const E* k = (const E*)w.own_k + ((int64_t)own * s.heads + head) * s.d_qk_padded;
  F sum = f_zero();
  int c = 0;
  for (; c + kGroup <= s.d_qk_padded; c += kGroup) {
    sum = f_fma(P::load(q + c), P::load(k + c), sum);
  }
  if (c < s.d_qk_padded) {
    E rest[2][kGroup] = {};
    __builtin_memcpy(rest[0], q + c, sizeof(E) * (s.d_qk_padded - c));
    __builtin_memcpy(rest[1], k + c, sizeof(E) * (s.d_qk_padded - c));
    sum = f_fma(P::load(rest[0]), P::load(rest[1]), sum);
  }
  const float score = f_sum(sum) + (w.own_bias ? w.own_bias[row] : 0.0f);
  const F weight = silu<true>(f_set1(score));
  const E* v = (const E*)w.own_v + ((int64_t)own * s.heads + head) * s.d_v_padded;
  float* sums = w.sums + (int64_t)row * s.d_v_padded;
  for (int i = 0; i < s.d_v_padded; i += kGroup) {
    f_store(sums + i, f_fma(weight, P::load(v + i), f_load(sums + i)));
  }
}

// Adds own keys to the sums, and scales them into `out`.
template <class P>
static void finish_head(const Attend& w, int head) {
  const Shape& s = *w.shape;
  const F scale = f_set1(w.scale);
  for (int r = 0; r < w.count; ++r) {
    if (w.places[r].own >= 0) own_key<P>(w, head, r);
    const float* sums = w.sums + (int64_t)r * s.d_v_padded;
    float* out = w.out + ((int64_t)r * s.heads + head) * s.d_v;
    int c = 0;
    for (; c + kGroup <= s.d_v; c += kGroup) f_store(out + c, f_mul(f_load(sums + c), scale));
    if (c < s.d_v) f_store_n(out + c, f_mul(f_load(sums + c), scale), s.d_v - c);
  }
}

template <class P>
static void attend(const Attend* work) {
  typedef typename P::E E;
  const Attend& w = *work;
  const Shape& s = *w.shape;
  int begin = w.keys, end = 0;
  for (int r = 0; r < w.count; ++r) {
    if (w.low[r] < w.high[r]) {
      begin = w.low[r] < begin ? w.low[r] : begin;
      end = w.high[r] > end ? w.high[r] : end;
    }
  }
  for (int head = 0; head < s.heads; ++head) {
    for (int i = 0; i < w.count * s.d_v_padded; i += kGroup) f_store(w.sums + i, f_zero());
    for (int key = begin / kChunk * kChunk; key < end; key += kChunk) {
      const int keys = w.keys - key < kChunk ? w.keys - key : kChunk;
      const E* b[4];
      const E* v[2] = {nullptr, nullptr};
      for (int part = 0; part * kBlockTokens < keys; ++part) {
        const uint8_t* block = w.blocks[key / kBlockTokens + part] + w.layer_offset;
        const E* k = (const E*)(block + head * s.k_head_bytes);
        b[2 * part] = k;
        b[2 * part + 1] = k + (int64_t)s.d_qk_padded * kGroup;
        v[part] = (const E*)(block + s.heads * s.k_head_bytes + head * s.v_head_bytes);
      }
      int r = 0;
      for (; r + kTileRows <= w.count; r += kTileRows) {
        chunk_rows<P, kTileRows>(w, head, r, key, keys, b, v[0], v[1]);
      }
      switch (w.count - r) {
        case 1: chunk_rows<P, 1>(w, head, r, key, keys, b, v[0], v[1]); break;
        case 2: chunk_rows<P, 2>(w, head, r, key, keys, b, v[0], v[1]); break;
        case 3: chunk_rows<P, 3>(w, head, r, key, keys, b, v[0], v[1]); break;
        case 4: chunk_rows<P, 4>(w, head, r, key, keys, b, v[0], v[1]); break;
        case 5: chunk_rows<P, 5>(w, head, r, key, keys, b, v[0], v[1]); break;
      }
    }
    finish_head<P>(w, head);
  }
}

// ── Norms and gates ─────────────────────────────────────────────────────────────────────────

// Calls with the first column and the number of columns of each group: the last may be shorter.
template <class Each>
static inline __attribute__((always_inline)) void for_groups(int n, Each each) {
  int c = 0;
  for (; c + kGroup <= n; c += kGroup) each(c, kGroup);
  if (c < n) each(c, n - c);
}

static inline __attribute__((always_inline)) F load_some(const float* p, int n) {
  return n == kGroup ? f_load(p) : f_load_n(p, n);
}

static inline __attribute__((always_inline)) void store_some(float* p, F x, int n) {
  if (n == kGroup) {
    f_store(p, x);
  } else {
    f_store_n(p, x, n);
  }
}

// Sum of value(c, k) over the groups of n columns, in four sums for the sake of latency.
template <class Value>
static inline __attribute__((always_inline)) float sum_of(int n, Value value) {
  F sum[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
  int c = 0;
  for (; c + 4 * kGroup <= n; c += 4 * kGroup) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = f_add(sum[i], value(c + i * kGroup, kGroup));
  }
  for_groups(n - c, [&](int rest, int k) { sum[0] = f_add(sum[0], value(c + rest, k)); });
  return f_sum(f_add(f_add(sum[0], sum[1]), f_add(sum[2], sum[3])));
}

// Mean and 1/sqrt(variance + eps) of n floats.
static inline void moments(const float* x, int n, float eps, F* mean, F* inverse) {
  const F m = f_set1(sum_of(n, [&](int c, int k) { return load_some(x + c, k); }) / n);
  const float squares = sum_of(n, [&](int c, int k) {
    F d = f_sub(load_some(x + c, k), m);
    if (k < kGroup) d = f_keep((1u << k) - 1, d);
    return f_mul(d, d);
  });
  *mean = m;
  *inverse = f_set1(1.0f / __builtin_sqrtf(squares / n + eps));
}

// Normalized floats of one row, scaled and shifted where there are weight and bias.
struct Normalized {
  const float *x, *weight, *bias;
  F mean, inverse;

  Normalized(const float* from, int n, float eps, const float* scale, const float* shift)
      : x(from), weight(scale), bias(shift) {
    moments(x, n, eps, &mean, &inverse);
  }
  inline __attribute__((always_inline)) F operator()(int c, int k) const {
    F v = f_mul(f_sub(load_some(x + c, k), mean), inverse);
    if (weight) v = f_mul(v, load_some(weight + c, k));
    if (bias) v = f_add(v, load_some(bias + c, k));
    return v;
  }
};

static inline const float* of_group(const float* parameter, const uint8_t* groups, int row,
                                    int width) {
  return parameter && groups ? parameter + (int64_t)groups[row] * width : parameter;
}

// Writes value(c, k) of `width` columns, in the precision of products.
template <class P, class Value>
static inline __attribute__((always_inline)) void emit(typename P::E* target, int width,
                                                       Value value) {
  for_groups(width, [&](int c, int k) {
    if (k == kGroup) {
      P::store(target + c, value(c, k));
    } else {
      typename P::E rest[kGroup];
      P::store(rest, value(c, k));
      __builtin_memcpy(target + c, rest, sizeof(rest[0]) * k);
    }
  });
}

template <class P>
static void norm_rows(const float* x, int32_t count, int32_t width, const Norm* norm,
                      const uint8_t* groups, void* rows, int64_t stride) {
  typedef typename P::E E;
  for (int r = 0; r < count; ++r) {
    E* target = (E*)rows + r * stride;
    emit<P>(target, width,
            Normalized(x + (int64_t)r * width, width, norm->eps,
                       of_group(norm->weight, groups, r, width),
                       of_group(norm->bias, groups, r, width)));
    for (int64_t c = width; c < stride; ++c) target[c] = 0;
  }
}

template <class P>
static void gate_rows(int32_t gate, int32_t head_norm, const float* u, const float* a,
                      int32_t count, int32_t heads, int32_t d_v, const Norm* norm,
                      const uint8_t* groups, float* scratch, void* rows, int64_t stride) {
  typedef typename P::E E;
  const int width = heads * d_v;
  const int parts = head_norm ? heads : 1, part = width / parts;
  float* product = scratch;          // what is normalized, where that is not `a`
  float* normed = scratch + width;
  for (int r = 0; r < count; ++r) {
    const float* ur = u + (int64_t)r * width;
    const float* ar = a + (int64_t)r * width;
    E* target = (E*)rows + r * stride;
    const float* weight = of_group(norm->weight, groups, r, width);
    const float* bias = of_group(norm->bias, groups, r, width);
    const float* source = ar;
    if (gate == gr::kNormOfProduct) {
      for_groups(width, [&](int c, int k) {
        store_some(product + c, f_mul(load_some(ur + c, k), load_some(ar + c, k)), k);
      });
      source = product;
    }
    for (int h = 0; h < parts; ++h) {
      const int first = h * part;
      const Normalized values(source + first, part, norm->eps, weight ? weight + first : nullptr,
                              bias ? bias + first : nullptr);
      for_groups(part, [&](int c, int k) { store_some(normed + first + c, values(c, k), k); });
    }
    const auto gates = [&](int c, int k) { return load_some(ur + c, k); };
    const auto attended = [&](int c, int k) { return load_some(ar + c, k); };
    const auto norms = [&](int c, int k) { return load_some(normed + c, k); };
    const auto products = [&](int c, int k) { return f_mul(gates(c, k), norms(c, k)); };
    int written = width;
    switch (gate) {
      case gr::kUTimesNorm: emit<P>(target, width, products); break;
      case gr::kNormOfProduct: emit<P>(target, width, norms); break;
      default:
        emit<P>(target, width, gates);
        if (gate == gr::kUNormProduct) {
          emit<P>(target + width, width, norms);
        } else {
          emit<P>(target + width, width, attended);
        }
        emit<P>(target + 2 * width, width, products);
        written = 3 * width;
    }
    for (int64_t c = written; c < stride; ++c) target[c] = 0;
  }
}

// ── Packing ─────────────────────────────────────────────────────────────────────────────────

// Rows of a (columns, depth) matrix, as the columns of a panel.
template <class P>
static void pack(const float* source, int64_t row_stride, int64_t columns, int64_t depth,
                 int64_t padded_depth, void* target) {
  typedef typename P::E E;
  E* out = (E*)target;
  for (int64_t group = 0; group * kGroup < columns; ++group) {
    for (int64_t k = 0; k < padded_depth; k += P::kStep) {
      for (int64_t c = 0; c < kGroup; ++c) {
        for (int64_t i = 0; i < P::kStep; ++i) {
          const int64_t column = group * kGroup + c;
          float lane[kGroup] = {};
          lane[0] = column < columns && k + i < depth ? source[column * row_stride + k + i] : 0.0f;
          E one[kGroup];
          P::store(one, f_load(lane));
          *out++ = one[0];
        }
      }
    }
  }
}

// Activated scores.
template <class P>
static int64_t scratch_bytes(const Shape*) {
  return (int64_t)sizeof(typename P::E) * gr::kRows * kChunk;
}

template <class P>
static constexpr gr::Kernels kernels(const char* name) {
  return {name,      sizeof(typename P::E), P::kStep,     pack<P>,       norm_rows<P>,
          linear<P>, attend<P>,             gate_rows<P>, place_token<P>, scratch_bytes<P>,
          nullptr,   nullptr};
}

}  // namespace GR_ISA
