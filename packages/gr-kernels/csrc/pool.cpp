#include "pool.h"

#include <system_error>

#ifdef __linux__
#include <dirent.h>
#include <pthread.h>
#include <sched.h>

#include <cstdlib>
#endif

namespace gr {

namespace {
// Phases of a layer follow each other within microseconds; a sleeping worker would miss half of one.
constexpr int kSpins = 2000;
constexpr uint64_t kNone = 0xFFFFFFFF;  // as the next item: there is none, and none is to be taken

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
#ifdef __linux__
// The processors of all threads of this process.
void add_processors(cpu_set_t* all) {
  DIR* tasks = opendir("/proc/self/task");
  if (!tasks) return;
  while (const dirent* task = readdir(tasks)) {
    cpu_set_t its;
    const int id = std::atoi(task->d_name);
    if (id > 0 && sched_getaffinity(id, sizeof its, &its) == 0) CPU_OR(all, all, &its);
  }
  closedir(tasks);
}
#endif

// OpenMP may have bound the caller to one processor, which would be that of all workers too.
void spread(std::vector<std::thread>& workers) {
#ifdef __linux__
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return;
  if (CPU_COUNT(&all) > (int)workers.size()) return;
  add_processors(&all);
  for (std::thread& worker : workers) {
    pthread_setaffinity_np(worker.native_handle(), sizeof all, &all);
  }
#else
  (void)workers;
#endif
}
}  // namespace

Pool::Pool(int threads) : ticket_(kNone) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { loop(i); });
    if (!workers_.empty()) spread(workers_);
  } catch (const std::system_error&) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    ++round_;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int64_t items, Work work, void* context) {
  if (workers_.empty() || items < 2) {
    for (int64_t i = 0; i < items; ++i) work(context, i, 0);
    return;
  }
  // The last round is closed before anything of the next one can be read.
  const uint64_t round = (round_.load() + 1) << 32;
  ticket_ = round | kNone;
  items_ = items;
  work_ = work;
  context_ = context;
  left_ = items;
  ticket_ = round;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++round_;
  }
  wake_.notify_all();
  drain(0);
  for (int i = 0; i < kSpins && left_ > 0; ++i) pause();
  if (left_ > 0) {
    std::unique_lock<std::mutex> lock(mutex_);
    is_waiting_ = true;
    done_.wait(lock, [this] { return left_ == 0; });
    is_waiting_ = false;
  }
}

void Pool::drain(int worker) {
  for (uint64_t ticket = ticket_;;) {
    const int64_t item = ticket & kNone;
    if (item >= items_) return;
    const Work work = work_;
    void* const context = context_;
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
    work(context, item, worker);
    if (--left_ == 0 && is_waiting_) {
      std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
    ticket = ticket_;
  }
}

void Pool::loop(int worker) {
  uint64_t seen = 0;
  while (!stopping_) {
    for (int i = 0; i < kSpins && round_ == seen; ++i) pause();
    if (round_ == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_ != seen; });
    }
    seen = round_;
    drain(worker);
  }
}

}  // namespace gr
