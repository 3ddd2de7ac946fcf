// Exact search: blocks of items against a few users at once, in each worker the best so far of
// every user in a heap, whose worst is the threshold that most scores never pass.

#include "topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "topk_kernels.h"

namespace {

using gr::kTopkItems;
using gr::kTopkUsers;

constexpr int64_t kPieceBytes = 1 << 18;    // of the table, of one piece of work: a part of L2
constexpr int64_t kHeapBytes = 32 << 20;    // of the users that go through the table together
constexpr int64_t kMostUsers = 64;

struct Found {
  float score;
  int32_t item;
};

bool is_better(const Found& one, const Found& other) {
  return one.score > other.score || (one.score == other.score && one.item < other.item);
}

const gr::TopkKernels* kernels_named(const char* name) {
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool any = std::strcmp(name, "auto") == 0;
  if (has_avx512 && (any || std::strcmp(name, "avx512") == 0)) return &gr::kTopkAvx512;
  if (has_avx2 && (any || std::strcmp(name, "avx2") == 0)) return &gr::kTopkAvx2;
  return nullptr;
}

}  // namespace

struct gr_topk_index {
  gr_topk_index(const float* table, int64_t rows, int32_t width, const gr::TopkKernels& set,
                int32_t threads)
      : kernels(set), items(rows - 1), depth(width), pool(threads) {
    const int64_t panels = (items + kTopkItems - 1) / kTopkItems;
    float* out = (float*)memory.keep(panels * kTopkItems * depth * 4);
    packed = out;
    for (int64_t group = 0; group < panels * kTopkItems / 16; ++group) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t lane = 0; lane < 16; ++lane) {
          const int64_t item = group * 16 + lane;
          *out++ = item < items ? table[(item + 1) * depth + d] : 0.0f;
        }
      }
    }
    const int64_t panel_bytes = kTopkItems * depth * 4;
    piece = std::max<int64_t>(1, kPieceBytes / panel_bytes) * kTopkItems;
  }

  void search(const float* users, int64_t count, int64_t k, float* scores, int64_t* places) {
    const int64_t workers = pool.threads();
    // One user always fits: that takes no more memory than the answer, times the workers.
    const int64_t fit = kHeapBytes / (k * workers * (int64_t)sizeof(Found));
    const int64_t together = std::min({count, kMostUsers, std::max<int64_t>(1, fit)});
    heaps = (Found*)workspace.reserve(workers * together * k * (int64_t)sizeof(Found));
    sizes.assign(workers * together, 0);
    most = k;
    for (int64_t first = 0; first < count; first += together) {
      here = users + first * depth;
      here_count = std::min(together, count - first);
      std::fill(sizes.begin(), sizes.end(), 0);
      pool.run((items + piece - 1) / piece, [](void* self, int64_t at, int worker) {
        ((gr_topk_index*)self)->score_piece(at, worker);
      }, this);
      for (int64_t u = 0; u < here_count; ++u) {
        answer(u, scores + (first + u) * k, places + (first + u) * k);
      }
    }
  }

  std::mutex mutex;

 private:
  // Its best so far of a user, in a worker: a heap with the worst in front once it is full.
  int64_t slot(int worker, int64_t user) const { return worker * here_count + user; }

  void score_piece(int64_t at, int worker) {
    float scores[kTopkUsers * kTopkItems];
    const int64_t end = std::min(items, (at + 1) * piece);
    for (int64_t item = at * piece; item < end; item += kTopkItems) {
      const int64_t real = std::min<int64_t>(kTopkItems, end - item);
      for (int64_t user = 0; user < here_count; user += kTopkUsers) {
        const int n = (int)std::min<int64_t>(kTopkUsers, here_count - user);
        kernels.score(here + user * depth, n, depth, packed + item * depth, scores);
        for (int u = 0; u < n; ++u) {
          keep_best(slot(worker, user + u), scores + u * kTopkItems, item, real);
        }
      }
    }
  }

  void keep_best(int64_t place, const float* scores, int64_t item, int64_t real) {
    Found* heap = heaps + place * most;
    int64_t& size = sizes[place];
    int64_t next = 0;
    for (; next < real && size < most; ++next) {
      const float score = std::isnan(scores[next]) ? -std::numeric_limits<float>::infinity()
                                                   : scores[next];
      heap[size++] = {score, (int32_t)(item + next)};
      if (size == most) std::make_heap(heap, heap + size, is_better);
    }
    if (next == real) return;
    // A worker meets the items in their order, so an equal score is never better than a kept one.
    uint64_t bits = kernels.above(scores, heap->score);
    bits &= real == kTopkItems ? ~0ull : (1ull << real) - 1;
    bits &= ~0ull << next;
    for (; bits; bits &= bits - 1) {
      const int at = __builtin_ctzll(bits);
      if (scores[at] <= heap->score) continue;  // it has risen since
      std::pop_heap(heap, heap + most, is_better);
      heap[most - 1] = {scores[at], (int32_t)(item + at)};
      std::push_heap(heap, heap + most, is_better);
    }
  }

  // The best of all workers, in order.
  void answer(int64_t user, float* scores, int64_t* places) {
    Found* best = heaps + slot(0, user) * most;
    int64_t size = sizes[slot(0, user)];
    if (size < most) std::make_heap(best, best + size, is_better);
    for (int worker = 1; worker < pool.threads(); ++worker) {
      const Found* theirs = heaps + slot(worker, user) * most;
      for (int64_t i = 0; i < sizes[slot(worker, user)]; ++i) {
        if (size == most) {
          if (!is_better(theirs[i], *best)) continue;
          std::pop_heap(best, best + size--, is_better);
        }
        best[size++] = theirs[i];
        std::push_heap(best, best + size, is_better);
      }
    }
    std::sort_heap(best, best + size, is_better);
    for (int64_t i = 0; i < size; ++i) {
      scores[i] = best[i].score;
      places[i] = best[i].item + 1;
    }
  }

  const gr::TopkKernels& kernels;
  const int64_t items;   // without row 0
  const int64_t depth;
  int64_t piece;         // items of a piece of work, a multiple of kTopkItems
  const float* packed;
  gr::Memory memory, workspace;
  gr::Pool pool;

  // Of the search that runs:
  const float* here = nullptr;   // users that go through the table together
  int64_t here_count = 0;
  int64_t most = 0;              // k
  Found* heaps = nullptr;
  std::vector<int64_t> sizes;

  friend int32_t gr_topk_search(gr_topk_index*, const float*, int64_t, int64_t, float*, int64_t*);
};

extern "C" gr_topk_index* gr_topk_create(const float* table, int64_t rows, int32_t width,
                                         const char* instruction_set, int32_t threads) {
  if (!table || rows < 1 || rows > INT32_MAX || width < 1 || !instruction_set || threads < 1 ||
      threads > 1024) {
    return nullptr;
  }
  const gr::TopkKernels* kernels = kernels_named(instruction_set);
  if (!kernels) return nullptr;
  try {
    return new gr_topk_index(table, rows, width, *kernels, threads);
  } catch (const std::bad_alloc&) {
  } catch (const std::system_error&) {  // no more threads
  }
  return nullptr;
}

extern "C" void gr_topk_destroy(gr_topk_index* index) { delete index; }

extern "C" int32_t gr_topk_search(gr_topk_index* index, const float* users, int64_t count,
                                  int64_t k, float* scores, int64_t* places) {
  if (!index || count < 0 || k < 0 || k > index->items) return GR_TOPK_INVALID;
  if (count == 0 || k == 0) return GR_TOPK_OK;
  if (!users || !scores || !places) return GR_TOPK_INVALID;
  try {
    const std::lock_guard<std::mutex> lock(index->mutex);
    index->search(users, count, k, scores, places);
    return GR_TOPK_OK;
  } catch (const std::bad_alloc&) {
    return GR_TOPK_NO_MEMORY;
  }
}
