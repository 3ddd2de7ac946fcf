// The op hstu_paged_attention: attention of new tokens on K and V in pages of the caller's.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "gr_kernels.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace gr {

// Threads and their memory, which the layers of a model share: they run one after another.
struct Workers {
  explicit Workers(int threads) : pool(threads) {}
  std::mutex busy;
  Pool pool;
  Memory workspace;
};

class PagedAttention {
 public:
  PagedAttention(const gr_paged_config& config, const Kernels& kernels, int threads);

  const Kernels& kernels() const { return kernels_; }
  int64_t page_bytes() const { return page_bytes_; }
  // What is wrong with a call; empty if nothing is.
  std::string check(const gr_paged_call& call) const;
  // Of a call that is right. Throws std::bad_alloc.
  void run(const gr_paged_call& call);

 private:
  struct Batch;
  struct Piece;
  void store(const Batch& batch, int64_t item, int worker) const;
  void attend(const Batch& batch, const Piece& piece, int worker) const;

  const gr_paged_config config_;
  const Kernels& kernels_;
  const Shape shape_;
  const int64_t page_bytes_;
  const std::shared_ptr<Workers> workers_;
  Memory memory_;
  uint8_t* zeros_;  // a page
};

}  // namespace gr
