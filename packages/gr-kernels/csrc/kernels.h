// What an instruction set offers to the driver: plain functions on plain memory.
//
// Memory that products read is "packed": columns in groups of 16, [group][k / step][16][step],
// where step is the number of k that one instruction multiplies (1 for float32, 2 for bfloat16).
// Rows ("panels") are row-major, their length a multiple of step, zero beyond what is real.
#pragma once

#include <stdint.h>

namespace gr {

constexpr int kBlockTokens = 32;
constexpr int kGroup = 16;
constexpr int kMaxGroups = 4;          // groups of one panel of columns
constexpr int kRows = 48;              // rows of one piece of work
constexpr int kChunk = 64;             // keys that are scored at once, two blocks

enum class Section : int32_t { kU, kV, kQ, kK, kOutput };

enum Gate : int32_t { kUTimesNorm, kUNormProduct, kUAttentionProduct, kNormOfProduct };

// Up to 64 columns of a weight matrix that go to one place.
struct Panel {
  Section section;
  int32_t head;
  int32_t column;    // its first column within U, the output, or the head
  int32_t columns;   // real ones
  int32_t groups;
  int32_t silu;
  float scale;       // applied last
  const void* weight;
  const float* bias;  // groups·16 floats, or null
};

// Where K and V of a row go.
struct RowPlace {
  uint8_t* block;    // null for candidates
  int32_t slot;      // token within the block
  int32_t own;       // row of the own K and V, or -1 where the interval covers the row's own key
};

struct Shape {
  int32_t d_model, heads, d_qk, d_v;
  int32_t d_qk_padded;   // to a multiple of step
  int32_t d_v_padded;    // to a multiple of 16
  int64_t k_head_bytes;  // K of one head in a block
  int64_t v_head_bytes;
};

// One call of `linear`: rows of a panel times a panel of columns.
struct Linear {
  const Shape* shape;
  const void* rows;          // (count, stride)
  int64_t stride;            // elements
  int64_t depth;             // k steps
  int32_t count;
  const Panel* panel;
  float* u;                  // (count, heads·d_v) of these rows
  void* q;                   // (count, heads, d_qk_padded)
  float* x;                  // (count, d_model), added to
  const RowPlace* places;    // (count)
  int64_t layer_offset;      // of the layer's K and V in a block
  void* own_k;               // (own rows, heads, d_qk_padded)
  void* own_v;               // (own rows, heads, d_v_padded)
  void* scratch;             // scratch_bytes()
};

// Attention of some rows of one segment, one head after another.
struct Attend {
  const Shape* shape;
  int32_t count;             // rows, at most kRows
  const void* q;             // (count, heads, d_qk_padded)
  const int32_t* low;        // (count)
  const int32_t* high;
  const RowPlace* places;
  const void* own_k;
  const void* own_v;
  uint8_t* const* blocks;
  int64_t layer_offset;      // of the layer's K and V in a block
  int32_t keys;              // N
  const float* bias;         // (count, bias_stride) or null
  int64_t bias_stride;
  const float* own_bias;     // (count) or null
  float scale;               // of the sum, 1/divisor
  float* out;                // (count, heads·d_v)
  void* scores;              // scratch_bytes()
  float* sums;               // scratch (kRows, d_v_padded)
};

struct Norm {
  const float* weight;       // (groups, width) or null
  const float* bias;
  float eps;
};

struct Kernels {
  const char* name;
  int32_t element_bytes;
  int32_t step;
  void (*pack)(const float* source, int64_t row_stride, int64_t columns, int64_t depth,
               int64_t padded_depth, void* target);
  void (*norm_rows)(const float* x, int32_t count, int32_t width, const Norm* norm,
                    const uint8_t* groups, void* rows, int64_t stride);
  void (*linear)(const Linear* work);
  void (*attend)(const Attend* work);
  void (*gate_rows)(int32_t gate, int32_t head_norm, const float* u, const float* a,
                    int32_t count, int32_t heads, int32_t d_v, const Norm* norm,
                    const uint8_t* groups, float* scratch, void* rows, int64_t stride);
  // Q, K and V, (heads, width) each or null, to where the attention reads them.
  void (*place_token)(const Shape* shape, const float* q, float scale, const float* k,
                      const float* v, const RowPlace* at, void* q_row, void* own_k, void* own_v);
  int64_t (*scratch_bytes)(const Shape* shape);
  // Before and after products of `count` rows in one thread, where it takes that.
  void (*begin)(int32_t count);
  void (*end)();
};

class Prepared {
 public:
  Prepared(const Kernels& kernels, int32_t count) : kernels_(kernels) {
    if (kernels.begin) kernels.begin(count);
  }
  ~Prepared() {
    if (kernels_.end) kernels_.end();
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

 private:
  const Kernels& kernels_;
};

}  // namespace gr
