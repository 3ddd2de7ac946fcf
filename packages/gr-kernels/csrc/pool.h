// Threads that share the items of one piece of work after another.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace gr {

class Pool {
 public:
  typedef void (*Work)(void* context, int64_t item, int worker);

  // The caller is one of the workers; with one thread there are no others.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return (int)workers_.size() + 1; }
  // Calls work for all items, in any order, and returns when all are done.
  void run(int64_t items, Work work, void* context);

 private:
  void loop(int worker);
  void drain(int worker);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> round_{0};
  std::atomic<int> busy_{0};
  int64_t items_ = 0;
  Work work_ = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;
};

}  // namespace gr
