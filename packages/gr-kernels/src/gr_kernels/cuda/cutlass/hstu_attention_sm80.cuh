// hstu_attention for compute capability 8.0 and later: cp.async, ldmatrix and mma.sync.
//
// While a tile of keys is computed with, the next ones come into shared memory behind its back.
// Scores go from the first product to the second in registers.
#pragma once

#include "attention.cuh"

namespace gr {

template <class T, int kD>
struct Sm80 {
  using Type = T;
  static constexpr int kColumns = kD;
  // Sums of 64 rows of 256 columns fill the registers of 4 warps, as those of 128 of 128 do.
  static constexpr int kTiles = kD <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kM = kWarps * kTiles * 16;
  static constexpr int kN = kD <= 128 ? 64 : 32;
  static constexpr int kStages = kD <= 64 ? 3 : 2;
  static constexpr int kPart = 32;  // keys whose scores are in registers at once
  static constexpr int kTileBytes = kN * kD * 2;
  static constexpr int kQueryBytes = kM * kD * 2;
  // At most 99 KB: what a block may have on every device of 8.x.
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kTileBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

template <class Of>
GR_DEVICE void attend_sm80(const Parameters& of) {
  using T = typename Of::Type;
  constexpr int kD = Of::kColumns, kM = Of::kM, kN = Of::kN, kStages = Of::kStages;
  constexpr int kTiles = Of::kTiles, kPart = Of::kPart, kThreads = Of::kThreads;
  const int head = block_y() / of.splits, split = block_y() % of.splits;
  const int thread = thread_index();
  // The last rows of a history see the most keys: they begin first.
  const Rows rows = find_rows<kM>(of, grid_x() - 1 - block_x());
  if (rows.count <= 0) return;
  if (rows.sequence < 0) return store_zeros<kD, kM, kThreads>(of, rows, head, split);
  const Sequence<kD> sequence(of, rows.sequence, head);
  int begin, end;
  find_keys<kM>(of, rows, sequence.keys, begin, end);
  const Range range = range_of<kN>(begin, end, split, of.splits);

  char* const memory = shared_memory();
  const auto k_tile = [&](int i) {
    return memory + Of::kQueryBytes + i % kStages * (2 * Of::kTileBytes);
  };
  const auto load = [&](int i) {
    if (i < range.tiles) {
      const int first = range.begin + i * kN;
      load_keys<kD, kN, kThreads>(k_tile(i), sequence.k, first, end, thread);
      load_keys<kD, kN, kThreads>(k_tile(i) + Of::kTileBytes, sequence.v, first, end, thread);
    }
    copy_commit();
  };
  load_queries<kD, kM, kThreads>(memory, of, rows, 0, head, thread);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  const int first_row = thread / 32 * kTiles * 16;  // of the warp's
  Pair pair[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) pair[t].find(of, rows, first_row + t * 16, sequence.keys);
  float sum[kTiles][kD / 8][4] = {};
  for (int i = 0; i < range.tiles; ++i) {
    copy_wait<kStages - 2>();
    // Also: nobody computes with the tile that the next load overwrites any more.
    block_barrier();
    load(i + kStages - 1);
#pragma unroll 1
    for (int part = 0; part < kN; part += kPart) {
      // Where the lane's rows of the three operands begin.
      const int stage = static_cast<int>(k_tile(i) - memory) + part * 128;
      int q_at = tile_offset<kM>(first_row + lane() % 16, lane() / 16);
      int k_at = stage + tile_offset<kN>(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
      int v_at = stage + Of::kTileBytes + tile_offset<kN>(lane() % 16, lane() / 16);
      hide(q_at), hide(k_at), hide(v_at);
      float score[kTiles][kPart / 8][4] = {};
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        uint32_t q[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          load_matrices(memory + moved<kM>(q_at, step * 2) + t * (16 * 128), q[t]);
        }
#pragma unroll
        for (int n = 0; n < kPart; n += 16) {
          uint32_t b[4];
          load_matrices(memory + moved<kN>(k_at, step * 2) + n * 128, b);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            T::multiply(score[t][n / 8], q[t], b[0], b[1]);
            T::multiply(score[t][n / 8 + 1], q[t], b[2], b[3]);
          }
        }
      }
      uint32_t weight[kTiles][kPart / 16][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        weigh<T, kPart>(score[t], pair[t], range.begin + i * kN + part, of.alpha);
        pack_weights<T, kPart>(score[t], weight[t]);
      }
#pragma unroll
      for (int step = 0; step < kPart / 16; ++step) {
#pragma unroll
        for (int column = 0; column < kD; column += 16) {
          uint32_t b[4];
          load_matrices_transposed(
              memory + moved<kN>(v_at, column / 8) + step * (16 * 128), b);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            T::multiply(sum[t][column / 8], weight[t][step], b[0], b[1]);
            T::multiply(sum[t][column / 8 + 1], weight[t][step], b[2], b[3]);
          }
        }
      }
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (split == 0) add_own_keys<T, kD>(sum[t], of, rows, sequence, pair[t], head);
    store_sums<T, kD>(sum[t], of, rows, pair[t], head, split);
  }
}

template <class Of>
GR_KERNEL(Of::kThreads)
hstu_attention_sm80(GR_PARAMETER Parameters of) {
  attend_sm80<Of>(of);
}

}  // namespace gr
