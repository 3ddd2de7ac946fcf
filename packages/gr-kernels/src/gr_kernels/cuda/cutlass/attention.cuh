// What the kernels of hstu_attention share: which rows and keys a block has, how tiles lie in shared
// memory, and what becomes of scores and sums in registers.
//
// A block computes kM rows of queries of one sequence and one head. A warp has tiles of 16 rows; of
// such a tile a lane holds, of scores and of sums alike, the rows lane / 4 and lane / 4 + 8 and, of
// every 8 columns, the two from 2 * (lane % 4) on: what mma.sync and wgmma both give and take.
//
// T queries, S keys outside blocks, H heads, D columns of a head.
#pragma once

#include "machine.cuh"

namespace gr {

constexpr int kPage = 32;  // tokens of a block of cached keys
constexpr int kNever = 0x7fffffff;

struct Parameters {
  const uint16_t *q, *k, *v;
  uint16_t* out;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head;  // strides
  const void *query_offsets, *key_offsets;
  const int32_t *low, *high, *own;
  const int64_t* addresses;  // null: no keys in blocks
  const int32_t* counts;
  int64_t addresses_stride, layer_offset;
  int tokens, sequences, heads, columns;
  int splits;
  float* workspace;  // (splits, tokens, heads, columns)
  bool wide_offsets;
  float alpha, scale;
};

GR_DEVICE int lane() { return thread_index() % 32; }
GR_DEVICE int least(int a, int b) { return a < b ? a : b; }
GR_DEVICE int most(int a, int b) { return a > b ? a : b; }

GR_DEVICE int offset_at(const Parameters& of, const void* offsets, int i) {
  return of.wide_offsets ? static_cast<int>(static_cast<const int64_t*>(offsets)[i])
                         : static_cast<const int32_t*>(offsets)[i];
}

// Some rows of one sequence, or some that are of none.
struct Rows {
  int first, count;  // the first row's token; rows from there to the end of the sequence
  int sequence;      // -1: of none
};

// What stands before the first sequence and behind the last is like a sequence more on either side.
// Part i, from a token on, has the blocks from begin / kM + i on: enough for all of its rows, however
// its begin falls, and known without a look at lengths. `blocks` says how many there are in all.
template <int kM>
GR_DEVICE Rows find_rows(const Parameters& of, int block) {
  const int parts = of.sequences + 2;
  const auto begin = [&](int part) {
    return part == 0 ? 0 : offset_at(of, of.query_offsets, part - 1);
  };
  int left = 0, right = parts;
  while (right - left > 1) {
    const int step = (right - left + 31) / 32;
    const int part = left + lane() * step;
    const bool begun = part < right && begin(part) / kM + part <= block;
    left += (__builtin_popcount(ballot(begun)) - 1) * step;
    right = least(right, left + step);
  }
  const int start = begin(left);
  const int end = left + 1 < parts ? begin(left + 1) : of.tokens;
  const int skipped = (block - (start / kM + left)) * kM;
  const bool is_real = 0 < left && left <= of.sequences;
  return Rows{start + skipped, end - start - skipped, is_real ? left - 1 : -1};
}

inline int64_t blocks(int64_t tokens, int64_t sequences, int m) {
  return tokens / m + sequences + 2;
}

// What a row sees: the keys from low to high - 1, and the key own where that is not -1.
struct Sight {
  int low, high, own;
};

GR_DEVICE Sight sight_of(const Parameters& of, const Rows& rows, int row, int keys) {
  if (row >= rows.count) return Sight{0, 0, -1};
  const int token = rows.first + row;
  Sight sees{of.low[token], least(of.high[token], keys), of.own[token]};
  // Most own keys just follow the interval, so they cost nothing of their own.
  if (sees.own == sees.high && sees.low <= sees.high) ++sees.high;
  if (sees.own >= sees.low && sees.own < sees.high) sees.own = -1;
  if (sees.low >= sees.high) sees.low = sees.high = 0;
  return sees;
}

// Keys that some row of the block sees lie from `begin` to `end` - 1. Every warp finds out alone.
template <int kM>
GR_DEVICE void find_keys(const Parameters& of, const Rows& rows, int keys, int& begin, int& end) {
  begin = kNever, end = 0;
#pragma unroll
  for (int i = 0; i < kM / 32; ++i) {
    const Sight sees = sight_of(of, rows, i * 32 + lane(), keys);
    if (sees.low < sees.high) {
      begin = least(begin, sees.low);
      end = most(end, sees.high);
    }
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    begin = least(begin, shuffle_xor(begin, mask));
    end = most(end, shuffle_xor(end, mask));
  }
}

// What of a block's keys is computed, in tiles of kN.
struct Range {
  int begin, end, tiles;
};

template <int kN>
GR_DEVICE Range range_of(int begin, int end, int split, int splits) {
  begin = least(begin / kN * kN, end);
  const int tiles = (end - begin + kN - 1) / kN;
  const int each = (tiles + splits - 1) / splits;
  return Range{begin + split * each * kN, end, least(tiles - split * each, each)};
}

// Where K, or V, of a sequence's keys is found, for one head.
template <int kD>
struct Keys {
  const uint16_t* rows;      // of the first key outside blocks
  int64_t stride;            // between these
  const int64_t* addresses;  // of blocks
  int64_t within;            // bytes from a block's begin
  int cached;                // keys in blocks

  GR_DEVICE const char* at(int place) const {
    if (place >= cached) {
      return reinterpret_cast<const char*>(rows + (place - cached) * stride);
    }
    const int64_t block = addresses[place / kPage] + within;
    return reinterpret_cast<const char*>(block) + place % kPage * (kD * 2);
  }
};

// K and V of one sequence and head, and how many keys it has.
template <int kD>
struct Sequence {
  Keys<kD> k, v;
  int keys, first_key;

  GR_DEVICE Sequence(const Parameters& of, int sequence, int head) {
    first_key = offset_at(of, of.key_offsets, sequence);
    const int cached = of.addresses ? of.counts[sequence] : 0;
    keys = cached + offset_at(of, of.key_offsets, sequence + 1) - first_key;
    const int64_t* addresses = of.addresses + sequence * of.addresses_stride;
    const int64_t area = kPage * kD * 2;  // bytes of a block's K, or V, of a head
    const int64_t within = of.layer_offset + head * area;
    const uint16_t* k_rows = of.k + first_key * of.k_token + head * of.k_head;
    const uint16_t* v_rows = of.v + first_key * of.v_token + head * of.v_head;
    k = Keys<kD>{k_rows, of.k_token, addresses, within, cached};
    v = Keys<kD>{v_rows, of.v_token, addresses, within + of.heads * area, cached};
  }
};

// Tiles in shared memory are panels of 64 columns (128 bytes), row by row, in each row the pieces of
// 16 bytes exchanged by the row's number: the 128-byte swizzle of the tensor-memory copies and of
// wgmma, without bank conflicts for ldmatrix.
template <int kRows>
GR_DEVICE int tile_offset(int row, int piece) {
  return piece / 8 * (kRows * 128) + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

// An offset that is `pieces` more to the right, for an even number: a constant, as it must be here,
// costs one operation, and addresses need not be kept. `offset` counts from a multiple of 1024 bytes.
template <int kRows>
GR_DEVICE int moved(int offset, int pieces) {
  return (offset ^ pieces % 8 * 16) + pieces / 8 * (kRows * 128);
}

// A tile of the keys from `first` on, zeros from `end` on.
template <int kD, int kRows, int kThreads>
GR_DEVICE void load_keys(char* tile, const Keys<kD>& from, int first, int end, int thread) {
  constexpr int kPieces = kD / 8;
  static_assert(kThreads % kPieces == 0 && kRows * kPieces % kThreads == 0);
  const int piece = thread % kPieces;
#pragma unroll 2
  for (int row = thread / kPieces; row < kRows; row += kThreads / kPieces) {
    const int place = first + row;
    const bool real = place < end;
    const char* at = real ? from.at(place) : reinterpret_cast<const char*>(from.rows);
    copy_async(tile + tile_offset<kRows>(row, piece), at + piece * 16, real);
  }
}

// Rows of queries from `first` of the block's on, zeros where there are none.
template <int kD, int kRows, int kThreads>
GR_DEVICE void load_queries(char* tile, const Parameters& of, const Rows& rows, int first, int head,
                            int thread) {
  constexpr int kPieces = kD / 8;
  static_assert(kThreads % kPieces == 0 && kRows * kPieces % kThreads == 0);
  const int piece = thread % kPieces;
  const uint16_t* q = of.q + head * of.q_head + piece * 8;
#pragma unroll
  for (int row = thread / kPieces; row < kRows; row += kThreads / kPieces) {
    const bool real = first + row < rows.count;
    const int64_t token = rows.first + (real ? first + row : 0);
    copy_async(tile + tile_offset<kRows>(row, piece), q + token * of.q_token, real);
  }
}

struct alignas(8) Two {
  float low, high;
};

// Where a split's sums of a row are kept.
template <int kD>
GR_DEVICE Two* part_of(const Parameters& of, int64_t token, int head, int split) {
  const int64_t row = (int64_t{split} * of.tokens + token) * of.heads + head;
  return reinterpret_cast<Two*>(of.workspace + row * kD);
}

// Rows that are of no sequence.
template <int kD, int kM, int kThreads>
GR_DEVICE void store_zeros(const Parameters& of, const Rows& rows, int head, int split) {
  constexpr int kPairs = kD / 2;
  for (int i = thread_index(); i < kM * kPairs; i += kThreads) {
    const int row = i / kPairs;
    if (row >= rows.count) return;
    if (of.splits > 1) {
      Two* to = part_of<kD>(of, rows.first + row, head, split);
      to[i % kPairs] = Two{0.0f, 0.0f};
    } else {
      uint16_t* to = of.out + (rows.first + row) * of.out_token + head * of.out_head;
      *reinterpret_cast<uint32_t*>(to + i % kPairs * 2) = 0;
    }
  }
}

// The two rows of a lane in a warp's tile of 16, and what all 16 see.
struct Pair {
  Sight sees[2];
  int from, to;  // all rows see the keys from `from` to `to` - 1
  int row;       // the first of the two, among the block's; the other follows 8 later

  GR_DEVICE void find(const Parameters& of, const Rows& rows, int first, int keys) {
    row = first + lane() / 4;
    from = 0, to = kNever;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sees[i] = sight_of(of, rows, row + 8 * i, keys);
      // Rows that are not there see what they like: their queries are zero, nobody reads them.
      if (row + 8 * i < rows.count) from = most(from, sees[i].low), to = least(to, sees[i].high);
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      from = most(from, shuffle_xor(from, mask));
      to = least(to, shuffle_xor(to, mask));
    }
  }
};

// Scores become weights, SiLU(alpha score), zero for keys that a row does not see.
template <class T, int kColumns>
GR_DEVICE void weigh(float (&score)[kColumns / 8][4], const Pair& pair, int first, float alpha) {
  const float half = 0.5f * alpha;
  if (first >= pair.from && first + kColumns <= pair.to) {
#pragma unroll
    for (int b = 0; b < kColumns / 8; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[b][i] = T::silu_of_twice(half * score[b][i]);
    }
    return;
  }
#pragma unroll
  for (int b = 0; b < kColumns / 8; ++b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + b * 8 + lane() % 4 * 2 + i % 2;
      const Sight& sees = pair.sees[i / 2];
      const bool seen = key >= sees.low && key < sees.high;
      score[b][i] = seen ? T::silu_of_twice(half * score[b][i]) : 0.0f;
    }
  }
}

// Weights of (16, kColumns) as the left operands of kColumns / 16 products.
template <class T, int kColumns>
GR_DEVICE void pack_weights(const float (&weight)[kColumns / 8][4],
                            uint32_t (&packed)[kColumns / 16][4]) {
#pragma unroll
  for (int s = 0; s < kColumns / 16; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&of)[4] = weight[2 * s + i / 2];
      packed[s][i] = T::pack(of[i % 2 * 2], of[i % 2 * 2 + 1]);
    }
  }
}

// Adds the own keys of two rows that lie apart from their intervals.
template <class T, int kD>
GR_DEVICE void add_own_keys(float (&sum)[kD / 8][4], const Parameters& of, const Rows& rows,
                            const Sequence<kD>& sequence, const Pair& pair, int head) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int own = pair.sees[i].own;
    // The four lanes of a row agree, but shuffles want all: rows without take part with nothing.
    float score = 0.0f;
    if (own >= 0) {
      const int64_t token = rows.first + pair.row + 8 * i;
      const char* q = reinterpret_cast<const char*>(of.q + token * of.q_token + head * of.q_head);
      const char* k = sequence.k.at(own);
#pragma unroll 4
      for (int piece = lane() % 4; piece < kD / 8; piece += 4) {
        const Words one = *reinterpret_cast<const Words*>(q + piece * 16);
        const Words other = *reinterpret_cast<const Words*>(k + piece * 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          score += T::low(one.at[w]) * T::low(other.at[w]);
          score += T::high(one.at[w]) * T::high(other.at[w]);
        }
      }
    }
    score += shuffle_xor(score, 1);
    score += shuffle_xor(score, 2);
    if (own >= 0) {
      const float weight = T::silu_of_twice(0.5f * of.alpha * score);
      const char* v = sequence.v.at(own) + lane() % 4 * 4;
#pragma unroll
      for (int b = 0; b < kD / 8; ++b) {
        const uint32_t packed = *reinterpret_cast<const uint32_t*>(v + b * 16);
        sum[b][2 * i] += weight * T::low(packed);
        sum[b][2 * i + 1] += weight * T::high(packed);
      }
    }
  }
}

template <class T, int kD>
GR_DEVICE void store_sums(const float (&sum)[kD / 8][4], const Parameters& of, const Rows& rows,
                          const Pair& pair, int head, int split) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (pair.row + 8 * i >= rows.count) continue;
    const int64_t token = rows.first + pair.row + 8 * i;
    if (of.splits > 1) {
      Two* to = part_of<kD>(of, token, head, split) + lane() % 4;
#pragma unroll
      for (int b = 0; b < kD / 8; ++b) to[b * 4] = Two{sum[b][2 * i], sum[b][2 * i + 1]};
      continue;
    }
    uint16_t* to = of.out + token * of.out_token + head * of.out_head + lane() % 4 * 2;
#pragma unroll
    for (int b = 0; b < kD / 8; ++b) {
      *reinterpret_cast<uint32_t*>(to + b * 8) =
          T::pack(sum[b][2 * i] * of.scale, sum[b][2 * i + 1] * of.scale);
    }
  }
}

// The sums of all splits, and their scale. Each thread has two columns.
template <class T>
GR_DEVICE void sum_splits(const Parameters& of, int threads) {
  const int64_t pair = int64_t{block_x()} * threads + thread_index();
  const int64_t pairs = of.columns / 2, all = pairs * of.heads * of.tokens;
  if (pair >= all) return;
  const Two* parts = reinterpret_cast<const Two*>(of.workspace) + pair;
  Two sum{0.0f, 0.0f};
  for (int split = 0; split < of.splits; ++split) {
    sum.low += parts[split * all].low;
    sum.high += parts[split * all].high;
  }
  const int64_t row = pair / pairs;
  uint16_t* to = of.out + row / of.heads * of.out_token + row % of.heads * of.out_head;
  *reinterpret_cast<uint32_t*>(to + pair % pairs * 2) =
      T::pack(sum.low * of.scale, sum.high * of.scale);
}

constexpr int kSumThreads = 256;

template <class T>
GR_KERNEL(kSumThreads)
hstu_attention_sum(GR_PARAMETER Parameters of) {
  sum_splits<T>(of, kSumThreads);
}

}  // namespace gr
