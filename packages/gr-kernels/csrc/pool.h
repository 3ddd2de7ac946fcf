// Threads that share the items of one piece of work after another.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
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
  // Calls work for all items, at most 2^31, in any order, and returns when all are done. Waits for
  // items that were begun, but never for a worker that does not get to run.
  void run(int64_t items, Work work, void* context);

 private:
  void loop(int worker);
  void drain(int worker);
  void stop();

  // The round, and in the lower half the next item of it that nobody has taken. Who reads the
  // following three and then takes an item by exchanging the ticket has read those of its round.
  std::atomic<uint64_t> ticket_;
  std::atomic<int64_t> items_{0};
  std::atomic<Work> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> left_{0};       // items that are not done
  std::atomic<bool> is_waiting_{false};  // the caller, for the last of them
  std::atomic<uint64_t> round_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
};

}  // namespace gr
