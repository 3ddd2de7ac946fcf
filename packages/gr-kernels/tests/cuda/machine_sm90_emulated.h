// The names of machine_sm90.cuh on a CPU. Copies arrive as late as they may, products are computed
// no sooner than they are waited for, from what their operands hold then.
#pragma once

namespace gr {

struct TensorMap {
  const char* base;
  int64_t sizes[3], strides[3];  // strides in bytes
  int box;
};

struct Barrier {
  int16_t arrivals, pending;
  uint32_t phase : 1;
  int32_t bytes : 31;
};
static_assert(sizeof(Barrier) == 8);

namespace emulated {

inline void complete_if_done(Barrier& barrier) {
  if (barrier.pending < 0) fail("more arrivals than a barrier expects");
  if (barrier.pending || barrier.bytes) return;
  barrier.phase = !barrier.phase;
  barrier.pending = barrier.arrivals;
  ++block->progress;
}

/* What others may read after this thread has said so must be visible to products. */
inline void check_fenced() {
  if (self().has_unfenced) fail("copies are announced without a fence");
}

/* An element of a tile of panels of 64 columns: swizzled by the bits of its address. */
template <class T>
inline float element(const char* tile, int rows, int row, int column) {
  if (reinterpret_cast<uintptr_t>(tile) % 1024) fail("a tile is not aligned");
  auto at = reinterpret_cast<uintptr_t>(tile) + column / 64 * rows * 128 + row * 128 +
            column % 64 * 2;
  at ^= (at >> 7 & 7) << 4;
  check_shared(reinterpret_cast<const void*>(at), 2);
  return T::low(*reinterpret_cast<const uint16_t*>(at));
}

}  // namespace emulated

inline void barrier_init(Barrier& barrier, int arrivals) {
  barrier = {};
  barrier.arrivals = barrier.pending = static_cast<int16_t>(arrivals);
}
inline void barriers_ready() {}
inline void arrive(Barrier& barrier) {
  emulated::check_fenced();
  --barrier.pending;
  emulated::complete_if_done(barrier);
}
inline void arrive_expecting(Barrier& barrier, int bytes) {
  barrier.bytes += bytes;
  arrive(barrier);
}
inline void wait(Barrier& barrier, int parity) {
  while (static_cast<int>(barrier.phase) == parity) {
    auto& boxes = emulated::block->boxes;
    if (!boxes.empty()) {
      boxes.front()();
      boxes.erase(boxes.begin());
      ++emulated::block->progress;
    } else {
      emulated::yield();
    }
  }
}
inline void group_barrier(int number, int threads) {
  emulated::check_fenced();
  if (number == 0) emulated::fail("barrier 0 is the block's");
  emulated::meet(emulated::block->named[number], threads);
}
inline void fence_for_products() { emulated::self().has_unfenced = false; }
template <int>
inline void release_registers() {}
template <int>
inline void claim_registers() {}

inline void copy_box(const TensorMap& map, Barrier& barrier, char* to, int column, int head,
                     int row) {
  emulated::check_shared(to, map.box * 128);
  if (reinterpret_cast<uintptr_t>(to) % 1024) emulated::fail("a box is not aligned");
  emulated::block->boxes.push_back([=, &map, &barrier] {
    for (int r = 0; r < map.box; ++r) {
      for (int c = 0; c < 64; ++c) {
        auto at = reinterpret_cast<uintptr_t>(to) + r * 128 + c * 2;
        at ^= (at >> 7 & 7) << 4;
        const int64_t place[3] = {column + c, head, int64_t{row} + r};
        bool is_inside = true;
        const char* from = map.base;
        for (int i = 0; i < 3; ++i) {
          is_inside &= 0 <= place[i] && place[i] < map.sizes[i];
          from += place[i] * map.strides[i];
        }
        uint16_t value = 0;
        if (is_inside) std::memcpy(&value, from, 2);
        std::memcpy(reinterpret_cast<void*>(at), &value, 2);
      }
    }
    barrier.bytes -= map.box * 128;
    emulated::complete_if_done(barrier);
  });
}

template <class T, int kN, int kD>
inline void start_scores(float (&score)[kN / 8][4], char* q_tile, char* k_tile) {
  for (auto& part : score) {
    for (float& value : part) value = NAN;
  }
  emulated::self().products.push_back([&score, q_tile, k_tile] {
    const int first = thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4;
    for (int half = 0; half < 2; ++half) {
      float q[kD];
      for (int c = 0; c < kD; ++c) {
        q[c] = emulated::element<T>(q_tile, 64, first + 8 * half, c);
      }
      for (int b = 0; b < kN / 8; ++b) {
        for (int i = 0; i < 2; ++i) {
          const int key = b * 8 + thread_index() % 4 * 2 + i;
          float sum = 0;
          for (int c = 0; c < kD; ++c) {
            sum = std::fma(q[c], emulated::element<T>(k_tile, kN, key, c), sum);
          }
          score[b][half * 2 + i] = sum;
        }
      }
    }
  });
}

template <class T, int kN, int kD>
inline void start_sums(float (&sum)[kD / 8][4], uint32_t (&weight)[kN / 16][4], char* v_tile) {
  emulated::self().products.push_back([&sum, &weight, v_tile] {
    emulated::together(weight, [&](auto of) {
      const int lane = thread_index() % 32;
      for (int half = 0; half < 2; ++half) {
        float row[kN];  // of weights: each of the row's four lanes holds a part
        for (int key = 0; key < kN; ++key) {
          const auto& theirs = of(lane / 4 * 4 + key % 8 / 2);
          const uint32_t pair = theirs[key / 16][half + key % 16 / 8 * 2];
          row[key] = key % 2 ? T::high(pair) : T::low(pair);
        }
        for (int b = 0; b < kD / 8; ++b) {
          for (int i = 0; i < 2; ++i) {
            float& to = sum[b][half * 2 + i];
            for (int key = 0; key < kN; ++key) {
              const int column = b * 8 + lane % 4 * 2 + i;
              to = std::fma(row[key], emulated::element<T>(v_tile, kN, key, column), to);
            }
          }
        }
      }
    });
  });
}

template <int kLeft>
inline void wait_products() {
  auto& products = emulated::self().products;
  while (products.size() > kLeft) {
    products.front()();
    products.erase(products.begin());
  }
}
template <int kCount>
inline void settle(float (&)[kCount][4]) {}

/* Refuses what cuTensorMapEncodeTiled does. */
inline const char* encode(TensorMap& map, const void* base, int columns, int heads, int64_t rows,
                          int64_t head_stride, int64_t row_stride, int box) {
  map = {static_cast<const char*>(base), {columns, heads, rows}, {2, head_stride * 2,
         row_stride * 2}, box};
  if (!base || reinterpret_cast<uintptr_t>(base) % 16) return "the base is null or not aligned";
  for (int i = 0; i < 3; ++i) {
    if (map.sizes[i] < 1 || map.sizes[i] > int64_t{1} << 32) return "a size is out of range";
  }
  for (int i = 1; i < 3; ++i) {
    const bool is_right = map.strides[i] > 0 && map.strides[i] < int64_t{1} << 40;
    if (!is_right || map.strides[i] % 16) return "a stride is out of range or not aligned";
  }
  if (box < 1 || box > 256) return "the box is too large";
  return nullptr;
}

}  // namespace gr
