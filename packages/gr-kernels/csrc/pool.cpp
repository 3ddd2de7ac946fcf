#include "pool.h"

namespace gr {

namespace {
// Phases of a layer follow each other within microseconds; a sleeping worker would miss half of one.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { loop(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    round_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int64_t items, Work work, void* context) {
  if (workers_.empty() || items < 2) {
    for (int64_t i = 0; i < items; ++i) work(context, i, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    items_ = items;
    work_ = work;
    context_ = context;
    next_.store(0);
    busy_.store((int)workers_.size());
    round_.fetch_add(1);
  }
  wake_.notify_all();
  drain(0);
  for (int i = 0; i < kSpins && busy_.load() > 0; ++i) pause();
  if (busy_.load() > 0) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_.load() == 0; });
  }
}

void Pool::drain(int worker) {
  for (int64_t i = next_.fetch_add(1); i < items_; i = next_.fetch_add(1)) {
    work_(context_, i, worker);
  }
}

void Pool::loop(int worker) {
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < kSpins && round_.load() == seen; ++i) pause();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_.load() != seen; });
      seen = round_.load();
      if (stopping_) return;
    }
    drain(worker);
    std::lock_guard<std::mutex> lock(mutex_);
    if (busy_.fetch_sub(1) == 1) done_.notify_one();
  }
}

}  // namespace gr
