// Aligned memory: kept pieces for weights, and a workspace that only grows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace gr {

constexpr int64_t kAlignment = 64;

inline int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* piece : pieces_) std::free(piece);
  }

  int64_t capacity() const { return capacity_; }

  // A piece of its own, for as long as this lives.
  void* keep(int64_t bytes) {
    void* piece = std::aligned_alloc(kAlignment, aligned(bytes + 1));
    if (!piece) throw std::bad_alloc();
    pieces_.push_back(piece);
    capacity_ += aligned(bytes + 1);
    return piece;
  }

  // One piece of at least so many bytes, its content arbitrary; the former one is gone.
  void* reserve(int64_t bytes) {
    if (pieces_.empty() || capacity_ < bytes) {
      for (void* piece : pieces_) std::free(piece);
      pieces_.clear();
      capacity_ = 0;
      keep(bytes);
    }
    return pieces_.front();
  }

 private:
  std::vector<void*> pieces_;
  int64_t capacity_ = 0;
};

// Hands out parts of a piece of memory; without one it only measures.
class Layout {
 public:
  explicit Layout(void* base) : base_((uint8_t*)base) {}
  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? (T*)(base_ + used_) : nullptr;
    used_ += aligned(count * (int64_t)sizeof(T));
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace gr
