// hstu_attention for compute capability 9.0: tensor-memory copies and products of warp groups.
//
// One warp group of a block brings tiles of keys into shared memory, stage after stage; two compute,
// each on 64 rows. While a warp group weighs the scores of one tile, the tensor cores multiply the
// weights of the tile before with V. Tiles whose keys all lie in rows of k and v come by
// tensor-memory copies; those with keys in blocks, or with fewer keys than fit, by cp.async.
#pragma once

#include "machine_sm90.cuh"

namespace gr {

template <class T, int kD>
struct Sm90 {
  using Type = T;
  static constexpr int kColumns = kD;
  static constexpr int kGroup = 128;     // threads of a warp group
  static constexpr int kConsumers = 2;   // warp groups that compute
  static constexpr int kThreads = kGroup * (1 + kConsumers);
  static constexpr int kM = kConsumers * 64;
  static constexpr int kN = kD <= 128 ? 128 : 64;
  static constexpr int kStages = kD <= 64 ? 4 : 2;
  static constexpr int kTileBytes = kN * kD * 2;
  static constexpr int kQueryBytes = 64 * kD * 2;  // of a warp group
  static constexpr int kBarriersAt = kConsumers * kQueryBytes + 2 * kStages * kTileBytes;
  static constexpr int kSharedBytes = kBarriersAt + 4 * kStages * sizeof(Barrier);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kGroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
};

struct Sm90Parameters {
  Parameters call;
  TensorMap k, v;
};

template <class Of>
const char* tensor_map(TensorMap& map, const Parameters& of, const void* base, int64_t keys,
                       int64_t head_stride, int64_t row_stride) {
  // No copy is asked of what has no rows, yet a map must have some; strides of one row mean nothing.
  if (keys == 0) return encode(map, of.q, Of::kColumns, 1, 1, Of::kColumns, Of::kColumns, 1);
  if (of.heads == 1) head_stride = Of::kColumns;
  if (keys == 1) row_stride = int64_t{of.heads} * Of::kColumns;
  return encode(map, base, Of::kColumns, of.heads, keys, head_stride, row_stride, Of::kN);
}

template <class Of>
const char* tensor_maps(Sm90Parameters& of, int64_t keys) {
  const Parameters& call = of.call;
  if (const char* why = tensor_map<Of>(of.k, call, call.k, keys, call.k_head, call.k_token)) {
    return why;
  }
  return tensor_map<Of>(of.v, call, call.v, keys, call.v_head, call.v_token);
}

// Brings tiles into stages. A full stage is told to its barrier by all threads of the warp group:
// after a tensor-memory copy was started, with the bytes to come; or once a thread's own copies have
// arrived, which is looked at when the next tile's are under way.
template <class Of>
struct Producer {
  static constexpr int kD = Of::kColumns, kN = Of::kN;
  int thread;
  Barrier* pending = nullptr;

  GR_DEVICE void tell_pending() {
    // What was copied by cp.async is read by products.
    fence_for_products();
    arrive(*pending);
    pending = nullptr;
  }

  GR_DEVICE void load(char* tile, Barrier& full, const TensorMap& map, const Keys<kD>& keys,
                      int first_row, int head, int first, int end) {
    if (first >= keys.cached && first + kN <= end) {
      if (pending) {
        copy_wait<0>();
        tell_pending();
      }
      if (thread != 0) {
        arrive(full);
        return;
      }
      arrive_expecting(full, Of::kTileBytes);
      for (int column = 0; column < kD; column += 64) {
        copy_box(map, full, tile + column * (kN * 2), column, head,
                 first_row + first - keys.cached);
      }
      return;
    }
    load_keys<kD, kN, Of::kGroup>(tile, keys, first, end, thread);
    copy_commit();
    if (pending) {
      copy_wait<1>();
      tell_pending();
    }
    pending = &full;
  }

  GR_DEVICE void finish() {
    copy_wait<0>();
    if (pending) tell_pending();
  }
};

template <class Of>
struct Tiles {
  char *queries, *k, *v;
  Barrier *k_full, *v_full, *k_free, *v_free;

  GR_DEVICE explicit Tiles(char* memory) {
    queries = memory;
    k = memory + Of::kConsumers * Of::kQueryBytes;
    v = k + Of::kStages * Of::kTileBytes;
    k_full = reinterpret_cast<Barrier*>(memory + Of::kBarriersAt);
    v_full = k_full + Of::kStages;
    k_free = v_full + Of::kStages;
    v_free = k_free + Of::kStages;
  }

  GR_DEVICE void init(int consumers) const {
    for (int stage = 0; stage < Of::kStages; ++stage) {
      barrier_init(k_full[stage], Of::kGroup);
      barrier_init(v_full[stage], Of::kGroup);
      barrier_init(k_free[stage], consumers * 4);  // one of each warp
      barrier_init(v_free[stage], consumers * 4);
    }
    barriers_ready();
  }
};

template <class Of>
GR_DEVICE void produce(const Sm90Parameters& all, const Tiles<Of>& tile, const Range& range,
                       const Sequence<Of::kColumns>& sequence, int head) {
  Producer<Of> producer{thread_index() % Of::kGroup};
#pragma unroll 1
  for (int i = 0; i < range.tiles; ++i) {
    const int stage = i % Of::kStages, was_free = i / Of::kStages % 2 ^ 1;
    const int first = range.begin + i * Of::kN, at = stage * Of::kTileBytes;
    wait(tile.k_free[stage], was_free);
    producer.load(tile.k + at, tile.k_full[stage], all.k, sequence.k, sequence.first_key, head,
                  first, range.end);
    wait(tile.v_free[stage], was_free);
    producer.load(tile.v + at, tile.v_full[stage], all.v, sequence.v, sequence.first_key, head,
                  first, range.end);
  }
  producer.finish();
}

template <class Of>
GR_DEVICE void consume(const Parameters& of, const Tiles<Of>& tile, const Range& range,
                       const Rows& rows, const Sequence<Of::kColumns>& sequence, int head,
                       int split) {
  using T = typename Of::Type;
  constexpr int kD = Of::kColumns, kN = Of::kN, kStages = Of::kStages;
  const int group = thread_index() / Of::kGroup - 1, thread = thread_index() % Of::kGroup;
  char* const queries = tile.queries + group * Of::kQueryBytes;
  load_queries<kD, 64, Of::kGroup>(queries, of, rows, group * 64, head, thread);
  copy_commit();
  copy_wait<0>();
  fence_for_products();
  group_barrier(1 + group, Of::kGroup);

  Pair pair;
  pair.find(of, rows, group * 64 + thread / 32 * 16, sequence.keys);
  const auto release = [&](Barrier& barrier) {
    if (lane() == 0) arrive(barrier);
  };
  float sum[kD / 8][4] = {};
  if (range.tiles > 0) {
    float score[kN / 8][4];
    uint32_t weight[kN / 16][4];
    wait(tile.k_full[0], 0);
    start_scores<T, kN, kD>(score, queries, tile.k);
    wait_products<0>();
    settle(score);
    release(tile.k_free[0]);
    weigh<T, kN>(score, pair, range.begin, of.alpha);
    pack_weights<T, kN>(score, weight);
#pragma unroll 1
    for (int i = 1; i < range.tiles; ++i) {
      const int stage = i % kStages, before = (i - 1) % kStages;
      wait(tile.k_full[stage], i / kStages % 2);
      start_scores<T, kN, kD>(score, queries, tile.k + stage * Of::kTileBytes);
      wait(tile.v_full[before], (i - 1) / kStages % 2);
      start_sums<T, kN, kD>(sum, weight, tile.v + before * Of::kTileBytes);
      wait_products<1>();
      settle(score);
      release(tile.k_free[stage]);
      weigh<T, kN>(score, pair, range.begin + i * kN, of.alpha);
      wait_products<0>();
      settle(sum);
      release(tile.v_free[before]);
      pack_weights<T, kN>(score, weight);
    }
    const int last = (range.tiles - 1) % kStages;
    wait(tile.v_full[last], (range.tiles - 1) / kStages % 2);
    start_sums<T, kN, kD>(sum, weight, tile.v + last * Of::kTileBytes);
    wait_products<0>();
    settle(sum);
  }
  if (split == 0) add_own_keys<T, kD>(sum, of, rows, sequence, pair, head);
  store_sums<T, kD>(sum, of, rows, pair, head, split);
}

template <class Of>
GR_DEVICE void attend_sm90(const Sm90Parameters& all) {
  constexpr int kD = Of::kColumns, kM = Of::kM;
  const Parameters& of = all.call;
  const int head = block_y() / of.splits, split = block_y() % of.splits;
  // The last rows of a history see the most keys: they begin first.
  const Rows rows = find_rows<kM>(of, grid_x() - 1 - block_x());
  if (rows.count <= 0) return;
  if (rows.sequence < 0) return store_zeros<kD, kM, Of::kThreads>(of, rows, head, split);
  const Sequence<kD> sequence(of, rows.sequence, head);
  int begin, end;
  find_keys<kM>(of, rows, sequence.keys, begin, end);
  const Range range = range_of<Of::kN>(begin, end, split, of.splits);
  const Tiles<Of> tile(shared_memory());
  // A warp group without rows leaves the tensor cores to the other one.
  const int consumers = least(Of::kConsumers, (rows.count + 63) / 64);
  if (thread_index() == 0) tile.init(consumers);
  block_barrier();
  if (thread_index() < Of::kGroup) {
    release_registers<Of::kProducerRegisters>();
    produce<Of>(all, tile, range, sequence, head);
  } else if (thread_index() / Of::kGroup <= consumers) {
    claim_registers<Of::kConsumerRegisters>();
    consume<Of>(of, tile, range, rows, sequence, head, split);
  }
}

template <class Of>
GR_KERNEL(Of::kThreads)
hstu_attention_sm90(GR_PARAMETER Sm90Parameters of) {
  attend_sm90<Of>(of);
}

}  // namespace gr
