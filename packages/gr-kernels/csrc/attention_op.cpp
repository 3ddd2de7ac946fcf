// The op hstu_attention on plain tensors: any widths, any intervals, in float32 inside.
//
// A unit of work is one head of one sequence. Its keys are packed once, transposed in tiles of
// kTile, so that scores and sums are products of broadcast rows with vectors of keys or columns. So
// many rows as there are registers for go together through the tiles that any of them sees; a row's
// sum is in the order of its keys, whatever its mates see.

#include "attention_op.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// Vectors pass between functions that are all inlined, so their convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

#define GR_INLINE inline __attribute__((always_inline))

#define GR_DEFINE_ISA(name, lanes, rows)                                                       \
  struct name {                                                                                \
    static constexpr int kLanes = lanes;                                                       \
    static constexpr int kRows = rows;                                                         \
    static constexpr int kTile = 2 * lanes;                                                    \
    typedef float Vector __attribute__((vector_size(4 * lanes), aligned(4), may_alias));       \
    typedef int32_t Integers __attribute__((vector_size(4 * lanes), aligned(4), may_alias));   \
  };
// Two vectors of sums a row: 16 of 32 registers, and 12 of 16.
GR_DEFINE_ISA(Avx512, 16, 8)
GR_DEFINE_ISA(Avx2, 8, 6)
#undef GR_DEFINE_ISA

template <class I>
GR_INLINE typename I::Vector load(const float* from) {
  return *reinterpret_cast<const typename I::Vector*>(from);
}

template <class I>
GR_INLINE void store(float* to, typename I::Vector value) {
  *reinterpret_cast<typename I::Vector*>(to) = value;
}

template <class I>
GR_INLINE typename I::Vector all(float value) {
  return typename I::Vector{} + value;
}

// x / (1 + exp(-x)), exp being 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
template <class I>
GR_INLINE typename I::Vector silu(typename I::Vector score) {
  using Vector = typename I::Vector;
  using Integers = typename I::Integers;
  Vector x = -score;
  x = x < all<I>(-87.0f) ? all<I>(-87.0f) : x;
  x = x > all<I>(88.0f) ? all<I>(88.0f) : x;
  const Vector magic = all<I>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504f + magic;
  const Vector n = shifted - magic;
  const Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = all<I>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (reinterpret_cast<const Integers&>(shifted) + 127) << 23;
  return score / (1.0f + p * reinterpret_cast<const Vector&>(power));
}

GR_INLINE float read(const float* from) { return *from; }

GR_INLINE float read(const uint16_t* from) {
  const uint32_t bits = static_cast<uint32_t>(*from) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GR_INLINE void write(float* to, float value) { *to = value; }

GR_INLINE void write(uint16_t* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

GR_INLINE int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Memory of one thread, grown to the longest sequence and then used again.
struct Workspace {
  std::vector<float> keys;    // tiles of (d_qk, kTile)
  std::vector<float> values;  // (keys, columns), columns being d_v rounded up to kTile
  std::vector<float> queries;  // (kRows, d_qk)
  std::vector<float> sums;     // (kRows, columns)
};

// kRows queries that go through the tiles together.
template <class I>
struct Rows {
  int64_t first;  // place in the sequence
  int count;
  int32_t low[I::kRows];
  int32_t high[I::kRows];
  int32_t own[I::kRows];
};

template <typename T, class I>
GR_INLINE void pack(const gr_attention_call& call, int64_t first, int count, int head, Workspace& w) {
  constexpr int kTile = I::kTile;
  const int d_qk = call.d_qk, d_v = call.d_v, columns = round_up(d_v, kTile);
  const int tiles = round_up(count, kTile) / kTile;
  w.keys.assign(static_cast<size_t>(tiles) * d_qk * kTile, 0.0f);
  w.values.assign(static_cast<size_t>(tiles) * kTile * columns, 0.0f);
  const T* k = static_cast<const T*>(call.k) + (first * call.heads + head) * d_qk;
  const T* v = static_cast<const T*>(call.v) + (first * call.heads + head) * d_v;
  for (int j = 0; j < count; ++j) {
    const T* key = k + static_cast<int64_t>(j) * call.heads * d_qk;
    float* tile = w.keys.data() + static_cast<size_t>(j / kTile) * d_qk * kTile + j % kTile;
    for (int d = 0; d < d_qk; ++d) tile[static_cast<size_t>(d) * kTile] = read(key + d);
    const T* value = v + static_cast<int64_t>(j) * call.heads * d_v;
    float* row = w.values.data() + static_cast<size_t>(j) * columns;
    for (int d = 0; d < d_v; ++d) row[d] = read(value + d);
  }
}

// Adds what the rows see of one tile to their sums.
template <class I>
GR_INLINE void run_tile(
    const gr_attention_call& call, const Rows<I>& rows, const float* bias, int keys, int tile, Workspace& w) {
  using Vector = typename I::Vector;
  using Integers = typename I::Integers;
  constexpr int kLanes = I::kLanes, kRows = I::kRows, kTile = I::kTile;
  const int d_qk = call.d_qk, columns = round_up(call.d_v, kTile), begin = tile * kTile;
  const float* k = w.keys.data() + static_cast<size_t>(tile) * d_qk * kTile;
  const float* q = w.queries.data();
  Vector score[kRows][2] = {};
  for (int d = 0; d < d_qk; ++d) {
    const Vector left = load<I>(k + static_cast<size_t>(d) * kTile);
    const Vector right = load<I>(k + static_cast<size_t>(d) * kTile + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vector one = all<I>(q[r * d_qk + d]);
      score[r][0] += one * left;
      score[r][1] += one * right;
    }
  }
  float weight[kRows][kTile];
  Integers lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < kRows; ++r) {
    float extra[kTile] = {};
    if (bias != nullptr && r < rows.count) {
      const int count = std::min(kTile, keys - begin);
      std::copy_n(bias + (rows.first + r) * keys + begin, count, extra);
    }
    for (int half = 0; half < 2; ++half) {
      const Integers key = lane + (begin + half * kLanes);
      const Vector active = silu<I>(score[r][half] + load<I>(extra + half * kLanes));
      const Integers sees = (key >= rows.low[r]) & (key < rows.high[r]);
      store<I>(weight[r] + half * kLanes, sees ? active : Vector{});
    }
  }
  const float* v = w.values.data() + static_cast<size_t>(begin) * columns;
  for (int column = 0; column < columns; column += kTile) {
    Vector sum[kRows][2];
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        sum[r][half] = load<I>(w.sums.data() + r * columns + column + half * kLanes);
    for (int j = 0; j < kTile; ++j) {
      const Vector left = load<I>(v + static_cast<size_t>(j) * columns + column);
      const Vector right = load<I>(v + static_cast<size_t>(j) * columns + column + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vector one = all<I>(weight[r][j]);
        sum[r][0] += one * left;
        sum[r][1] += one * right;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        store<I>(w.sums.data() + r * columns + column + half * kLanes, sum[r][half]);
  }
}

// Adds a row's own key, which its interval does not hold.
template <class I>
GR_INLINE void add_own(
    const gr_attention_call& call, const Rows<I>& rows, int r, const float* bias, int keys, Workspace& w) {
  constexpr int kTile = I::kTile;
  const int d_qk = call.d_qk, columns = round_up(call.d_v, kTile), own = rows.own[r];
  const float* k = w.keys.data() + static_cast<size_t>(own / kTile) * d_qk * kTile + own % kTile;
  float score = bias == nullptr ? 0.0f : bias[(rows.first + r) * keys + own];
  for (int d = 0; d < d_qk; ++d)
    score += w.queries[r * d_qk + d] * k[static_cast<size_t>(d) * kTile];
  const float weight = silu<I>(all<I>(score))[0];
  const float* v = w.values.data() + static_cast<size_t>(own) * columns;
  for (int d = 0; d < call.d_v; ++d) w.sums[r * columns + d] += weight * v[d];
}

template <typename T, class I>
GR_INLINE void run_unit(
    const gr_attention_call& call, int64_t sequence, int head, const float* bias, Workspace& w) {
  constexpr int kRows = I::kRows, kTile = I::kTile;
  const int64_t first_query = call.query_offsets[sequence];
  const int64_t queries = call.query_offsets[sequence + 1] - first_query;
  const int keys =
      static_cast<int>(call.key_offsets[sequence + 1] - call.key_offsets[sequence]);
  const int d_qk = call.d_qk, d_v = call.d_v, columns = round_up(d_v, kTile);
  if (queries == 0) return;
  pack<T, I>(call, call.key_offsets[sequence], keys, head, w);
  w.queries.resize(static_cast<size_t>(kRows) * d_qk);
  w.sums.resize(static_cast<size_t>(kRows) * columns);
  for (int64_t start = 0; start < queries; start += kRows) {
    Rows<I> rows{start, static_cast<int>(std::min<int64_t>(kRows, queries - start)), {}, {}, {}};
    std::fill(w.queries.begin(), w.queries.end(), 0.0f);
    std::fill(w.sums.begin(), w.sums.end(), 0.0f);
    int begin = keys, end = 0;
    for (int r = 0; r < rows.count; ++r) {
      const int64_t query = first_query + start + r;
      rows.low[r] = call.low[query];
      rows.high[r] = call.high[query];
      rows.own[r] = call.own[query];
      if (rows.low[r] < rows.high[r]) {
        begin = std::min(begin, rows.low[r]);
        end = std::max(end, rows.high[r]);
      }
      const T* q = static_cast<const T*>(call.q) + (query * call.heads + head) * d_qk;
      for (int d = 0; d < d_qk; ++d) w.queries[r * d_qk + d] = read(q + d) * call.alpha;
    }
    for (int tile = begin / kTile; tile * kTile < end; ++tile)
      run_tile<I>(call, rows, bias, keys, tile, w);
    for (int r = 0; r < rows.count; ++r) {
      const int own = rows.own[r];
      if (own >= 0 && (own < rows.low[r] || own >= rows.high[r])) add_own<I>(call, rows, r, bias, keys, w);
      T* out = static_cast<T*>(call.out) + ((first_query + start + r) * call.heads + head) * d_v;
      for (int d = 0; d < d_v; ++d) write(out + d, w.sums[r * columns + d] / call.divisor);
    }
  }
}

using Unit = void (*)(const gr_attention_call&, int64_t, int, const float*, Workspace&);

template <typename T>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void run_avx512(
    const gr_attention_call& call, int64_t sequence, int head, const float* bias, Workspace& w) {
  run_unit<T, Avx512>(call, sequence, head, bias, w);
}

template <typename T>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(
    const gr_attention_call& call, int64_t sequence, int head, const float* bias, Workspace& w) {
  run_unit<T, Avx2>(call, sequence, head, bias, w);
}

template <typename T>
Unit unit_of(int isa) {
  return isa == GR_ATTENTION_AVX512 ? run_avx512<T> : run_avx2<T>;
}

}  // namespace

extern "C" int gr_hstu_attention_isa(void) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return GR_ATTENTION_AVX512;
  if (__builtin_cpu_supports("x86-64-v3")) return GR_ATTENTION_AVX2;
  return GR_ATTENTION_NONE;
}

extern "C" int gr_hstu_attention(const gr_attention_call* given) {
  const gr_attention_call& call = *given;
  if (call.isa == GR_ATTENTION_NONE || call.isa > gr_hstu_attention_isa()) return 1;
  const Unit unit = call.is_bfloat16 ? unit_of<uint16_t>(call.isa) : unit_of<float>(call.isa);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    try {
      thread_local Workspace workspace;
      const int64_t units = call.sequences * call.heads;
      for (int64_t i = next++; i < units; i = next++) {
        const int64_t sequence = i / call.heads;
        const float* bias = call.bias == nullptr ? nullptr : call.bias + call.bias_offsets[sequence];
        unit(call, sequence, static_cast<int>(i % call.heads), bias, workspace);
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(call.threads, call.sequences * call.heads); ++i)
      others.emplace_back(work);
  } catch (const std::system_error&) {
    // Fewer threads than asked for do the same.
  }
  work();
  for (std::thread& other : others) other.join();
  return failed ? 2 : 0;
}
