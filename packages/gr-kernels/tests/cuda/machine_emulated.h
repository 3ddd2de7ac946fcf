// The names of machine.cuh (and machine_sm90.cuh) on a CPU, as the PTX manual describes them.
//
// Blocks run one after another. A block's threads are fibers of one thread of the system, each with
// a stack of its own; who waits lets the others run. Where all threads of a warp take part in
// something, each shows the others its operands, waits until all have, and computes its own part of
// the result from theirs. A wait that nobody can end stops the process and says so.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define GR_DEVICE inline
#define GR_KERNEL(threads) void
#define GR_PARAMETER

namespace gr {

struct alignas(16) Words {
  uint32_t at[4];
};

namespace emulated {

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated: %s\n", why);
  std::abort();
}

struct Meeting {  // a barrier
  int arrived = 0;
  long round = 0;
};

constexpr int kShown = 128;  // bytes that a lane can show

struct Warp {
  Meeting meeting;
  // Two of them: who is done with one may show the next before all have looked at it.
  alignas(16) char shown[2][32][kShown] = {};
};

struct AsyncCopy {
  char* to;
  Words value;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done = false;
  // Groups of copies under way, oldest first; the last is not committed yet.
  std::vector<std::vector<AsyncCopy>> copies{1};
  bool has_unfenced = false;  // copies that arrived, and that products may not read yet
  // Groups of products under way, oldest first.
  std::vector<std::function<void()>> products;
};

struct Block {
  int x, y, grid_x, threads;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting whole;
  Meeting named[16];
  char* shared;
  int shared_bytes;
  int current = 0;
  long progress = 0;  // grows with everything that may end somebody's wait
  ucontext_t scheduler;
  std::function<void()> body;
  // Tensor-memory copies under way: who waits for a barrier lets one arrive.
  std::vector<std::function<void()>> boxes;
};

inline thread_local Block* block = nullptr;

inline Fiber& self() { return block->fibers[block->current]; }
inline Warp& warp() { return block->warps[block->current / 32]; }

inline void yield() { swapcontext(&self().context, &block->scheduler); }

inline void meet(Meeting& meeting, int threads) {
  const long round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
    ++block->progress;
    return;
  }
  while (meeting.round == round) yield();
}

inline void meet_warp() { meet(warp().meeting, 32); }

/* Shows `mine`, and once all lanes of the warp have, calls `use` with what lane i shows as of(i). */
template <class V, class Use>
inline void together(const V& mine, Use use) {
  static_assert(sizeof(V) <= kShown);
  Warp& all = warp();
  auto& shown = all.shown[all.meeting.round % 2];
  std::memcpy(shown[block->current % 32], &mine, sizeof(V));
  meet_warp();
  use([&](int lane) -> const V& { return reinterpret_cast<const V&>(shown[lane]); });
}

inline void start() {
  block->body();
  self().is_done = true;
  ++block->progress;
  yield();
}

inline void check_shared(const void* at, int bytes) {
  const char* byte = static_cast<const char*>(at);
  if (byte < block->shared || byte + bytes > block->shared + block->shared_bytes) {
    fail("an access outside shared memory");
  }
}

inline void run_block(Block& of) {
  constexpr size_t kStack = 256 * 1024;
  block = &of;
  of.fibers = std::vector<Fiber>(of.threads);
  of.warps = std::vector<Warp>(of.threads / 32);
  for (Fiber& fiber : of.fibers) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  int done = 0;
  while (done < of.threads) {
    const long before = of.progress;
    done = 0;
    for (of.current = 0; of.current < of.threads; ++of.current) {
      if (!self().is_done) swapcontext(&of.scheduler, &self().context);
      done += self().is_done;
    }
    if (of.progress == before) fail("every thread waits for another");
  }
  for (Fiber& fiber : of.fibers) {
    if (fiber.copies.size() > 1 || !fiber.copies[0].empty()) fail("copies are left under way");
    if (!fiber.products.empty()) fail("products are left under way");
  }
  if (!of.boxes.empty()) fail("tensor-memory copies are left under way");
  block = nullptr;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace emulated

inline int thread_index() { return emulated::block->current; }
inline int block_x() { return emulated::block->x; }
inline int block_y() { return emulated::block->y; }
inline int grid_x() { return emulated::block->grid_x; }
inline void block_barrier() { emulated::meet(emulated::block->whole, emulated::block->threads); }
inline char* shared_memory() { return emulated::block->shared; }
inline void hide(int&) {}

template <class V>
inline V shuffle_xor(V value, int mask) {
  V found{};
  emulated::together(value, [&](auto of) { found = of((thread_index() % 32) ^ mask); });
  return found;
}

inline uint32_t ballot(bool value) {
  uint32_t found = 0;
  emulated::together(value, [&](auto of) {
    for (int i = 0; i < 32; ++i) found |= uint32_t(of(i)) << i;
  });
  return found;
}

/* What is copied arrives no sooner than it is waited for. */
inline void copy_async(char* to, const void* from, bool real) {
  emulated::check_shared(to, 16);
  if (reinterpret_cast<uintptr_t>(to) % 16 || (real && reinterpret_cast<uintptr_t>(from) % 16)) {
    emulated::fail("cp.async of 16 bytes that are not aligned");
  }
  emulated::AsyncCopy copy{to, {}};
  if (real) std::memcpy(&copy.value, from, 16);
  emulated::self().copies.back().push_back(copy);
}
inline void copy_commit() { emulated::self().copies.emplace_back(); }
template <int kLeft>
inline void copy_wait() {
  auto& copies = emulated::self().copies;
  while (copies.size() - 1 > kLeft) {
    for (const auto& copy : copies.front()) {
      std::memcpy(copy.to, &copy.value, 16);
      emulated::self().has_unfenced = true;
    }
    copies.erase(copies.begin());
  }
}

namespace emulated {

inline void load_matrices(const char* row, uint32_t (&to)[4], bool is_transposed) {
  check_shared(row, 16);
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row that is not aligned");
  together(row, [&](auto row_of) {
    const int lane = thread_index() % 32;
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        int r = lane / 4, c = lane % 4 * 2 + i;
        if (is_transposed) std::swap(r, c);
        pair[i] = reinterpret_cast<const uint16_t*>(row_of(m * 8 + r))[c];
      }
      to[m] = pair[0] | uint32_t(pair[1]) << 16;
    }
  });
}

/* mma.sync.m16n8k16 with sums in float32. */
template <class T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  together(mine, [&](auto of) {
    const auto half = [](uint32_t word, int i) { return i ? T::high(word) : T::low(word); };
    const int lane = thread_index() % 32;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
        const uint32_t right = of(column * 4 + k % 8 / 2).b[k / 8];
        c[i] = std::fma(half(left, k % 2), half(right, k % 2), c[i]);
      }
    }
  });
}

}  // namespace emulated

inline void load_matrices(const char* row, uint32_t (&to)[4]) {
  emulated::load_matrices(row, to, false);
}
inline void load_matrices_transposed(const char* row, uint32_t (&to)[4]) {
  emulated::load_matrices(row, to, true);
}

struct Bfloat16 {
  static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::multiply<Bfloat16>(c, a, b0, b1);
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  static float low(uint32_t packed) { return emulated::bits_float(packed << 16); }
  static float high(uint32_t packed) { return emulated::bits_float(packed & 0xffff0000u); }
  static float silu_of_twice(float x) {
    // tanh.approx has a relative error of at most 2^-11: here that of rounding to 11 bits.
    const uint32_t bits = emulated::float_bits(std::tanh(x));
    return std::fma(x, emulated::bits_float((bits + 0x1000u) & ~0x1fffu), x);
  }

 private:
  static uint32_t round(float value) {
    const uint32_t bits = emulated::float_bits(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
};

struct Float16 {
  static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::multiply<Float16>(c, a, b0, b1);
  }
  static uint32_t pack(float low, float high) {
    const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    uint32_t packed;
    std::memcpy(&packed, pair, 4);
    return packed;
  }
  static float low(uint32_t packed) {
    _Float16 value;
    std::memcpy(&value, &packed, 2);
    return static_cast<float>(value);
  }
  static float high(uint32_t packed) { return low(packed >> 16); }
  static float silu_of_twice(float x) { return 2 * x / (1 + std::exp(-2 * x)); }
};

struct OnDevice {
  const char* why = nullptr;
  explicit OnDevice(int) {}
};

template <class P>
inline const char* launch(void (*kernel)(P), int x, int y, int threads, int shared_bytes, void*,
                          const P& parameters) {
  std::unique_ptr<char[]> memory(new char[shared_bytes + 1024]);
  char* const shared = memory.get() + 1024 - reinterpret_cast<uintptr_t>(memory.get()) % 1024;
  for (int j = 0; j < y; ++j) {
    for (int i = 0; i < x; ++i) {
      emulated::Block block{};
      std::memset(shared, 0xff, shared_bytes);  // NaN
      block.x = i, block.y = j, block.grid_x = x, block.threads = threads;
      block.shared = shared, block.shared_bytes = shared_bytes;
      block.body = [&] { kernel(parameters); };
      emulated::run_block(block);
    }
  }
  return nullptr;
}

}  // namespace gr
