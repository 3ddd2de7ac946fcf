// The driver: all layers of a stack over a batch of segments, with the kernels of one set.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gr_kernels.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace gr {

struct Layer {
  Norm input_norm, attention_norm;
  std::vector<Panel> project;      // U and Q first, then V and K
  size_t kv_first;                 // where V and K begin
  std::vector<Panel> output;
  const float* position_bias;
  const float* time_bias;
};

class Stack {
 public:
  Stack(const gr_stack_config& config, const gr_layer_weights* layers, const Kernels& kernels,
        int threads);

  int64_t block_bytes() const { return layer_bytes_ * (int64_t)layers_.size(); }
  int64_t workspace_bytes() const { return workspace_.capacity(); }
  const Kernels& kernels() const { return kernels_; }

  // What is wrong with a call, or nothing.
  std::string check(const float* x, int64_t tokens, const gr_segment* segments,
                    int32_t count) const;
  void run(float* x, int64_t tokens, const gr_segment* segments, int32_t count);

  std::atomic_flag busy = ATOMIC_FLAG_INIT;

 private:
  struct Span {      // rows that go through a phase together
    int64_t row;
    int32_t count;
    int32_t segment;
    bool kv_only;
  };
  struct Batch;

  void plan(Batch& batch, bool last) const;
  void project(const Batch& batch, const Layer& layer, int64_t offset, int64_t item, int worker);
  void attend(const Batch& batch, const Layer& layer, int64_t offset, int64_t item, int worker);
  void output(const Batch& batch, const Layer& layer, int64_t item, int worker);
  uint8_t bucket_of(int64_t one, int64_t other) const;
  const float* bias(const Batch& batch, const Layer& layer, const Span& span, int worker);
  void add_panels(std::vector<Panel>& panels, Section section, int head, int columns,
                  const float* weight, const float* bias, int64_t depth, bool silu, float scale);
  const float* keep(const float* source, int64_t count);

  const gr_stack_config config_;
  const Kernels& kernels_;
  Shape shape_;
  int64_t d_model_stride_, gated_stride_, gated_;
  int64_t layer_bytes_;
  std::vector<uint64_t> thresholds_;
  std::vector<Layer> layers_;
  Memory weights_;
  Memory workspace_;
  Pool pool_;
};

}  // namespace gr
