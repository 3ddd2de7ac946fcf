#include "attention_op.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "rows.h"
#include "shape.h"

namespace gr {

namespace {

constexpr int64_t kSlack = 64;

// Rows of queries of one sequence.
struct Piece {
  int64_t sequence, row;
  int32_t count;
};

struct Call {
  const gr_attention_call& call;
  const Kernels& kernels;
  Rows q_rows, k_rows, v_rows;
  Shape shape;
  std::vector<Piece> pieces;
  std::vector<uint64_t> blocks;          // of all sequences
  std::vector<int64_t> first_block;      // of each sequence
  uint8_t *own_k, *own_v;                // of all keys, row by row
  uint8_t* q;                            // of each worker (kRows, heads, d_qk_padded)
  uint8_t* scores;
  float *sums, *bias, *rows, *out;
  RowPlace* places;
  int64_t q_bytes, scores_bytes, sums_count, bias_count, rows_count, out_count, bias_stride;
};

// Keys of one sequence into its blocks, and as rows for queries that see their own beside a range.
void pack_keys(const Call& c, int64_t sequence, int worker) {
  const gr_attention_call& call = c.call;
  const int64_t qk = (int64_t)call.heads * call.d_qk;
  float* scratch = c.rows + worker * c.rows_count;
  for (int64_t key = call.key_offsets[sequence]; key < call.key_offsets[sequence + 1]; ++key) {
    const int64_t place = key - call.key_offsets[sequence];
    RowPlace at;
    at.block = (uint8_t*)c.blocks[c.first_block[sequence] + place / kBlockTokens];
    at.slot = place % kBlockTokens;
    at.own = (int32_t)(key - call.key_offsets[0]);
    c.kernels.place_token(&c.shape, nullptr, 1.0f, c.k_rows.of(key, scratch),
                          c.v_rows.of(key, scratch + qk), &at, nullptr, c.own_k, c.own_v);
  }
}

void attend_piece(const Call& c, const Piece& piece, int worker) {
  const gr_attention_call& call = c.call;
  const int64_t width = (int64_t)call.heads * call.d_v;
  const int64_t first_key = call.key_offsets[piece.sequence];
  const int64_t keys = call.key_offsets[piece.sequence + 1] - first_key;
  uint8_t* q = c.q + worker * c.q_bytes;
  RowPlace* places = c.places + worker * kRows;
  float* bias = call.bias ? c.bias + worker * c.bias_count : nullptr;
  float* own_bias = bias + kRows * c.bias_stride;
  for (int r = 0; r < piece.count; ++r) {
    const int64_t row = piece.row + r, own = call.own[row];
    const bool apart = own >= 0 && !(call.low[row] <= own && own < call.high[row]);
    places[r].own = apart ? (int32_t)(first_key + own - call.key_offsets[0]) : -1;
    c.kernels.place_token(&c.shape, c.q_rows.of(row, c.rows + worker * c.rows_count), call.alpha,
                          nullptr, nullptr, nullptr,
                          q + r * call.heads * c.shape.d_qk_padded * c.kernels.element_bytes,
                          nullptr, nullptr);
    if (bias) {
      const float* given = call.bias + call.bias_offsets[piece.sequence] +
                           (row - call.query_offsets[piece.sequence]) * keys;
      std::memcpy(bias + r * c.bias_stride, given, keys * 4);
      std::fill(bias + r * c.bias_stride + keys, bias + (r + 1) * c.bias_stride, 0.0f);
      own_bias[r] = apart ? given[own] : 0.0f;
    }
  }
  Attend work;
  work.shape = &c.shape;
  work.count = piece.count;
  work.q = q;
  work.low = call.low + piece.row;
  work.high = call.high + piece.row;
  work.places = places;
  work.own_k = c.own_k;
  work.own_v = c.own_v;
  work.blocks = (uint8_t* const*)c.blocks.data() + c.first_block[piece.sequence];
  work.layer_offset = 0;
  work.keys = (int32_t)keys;
  work.bias = bias;
  work.bias_stride = c.bias_stride;
  work.own_bias = bias ? own_bias : nullptr;
  work.scale = 1.0f / call.divisor;
  work.out = c.out + worker * c.out_count;
  work.scores = c.scores + worker * c.scores_bytes;
  work.sums = c.sums + worker * c.sums_count;
  {
    const Prepared prepared(c.kernels, work.count);
    c.kernels.attend(&work);
  }
  for (int r = 0; r < piece.count; ++r) {
    store_values(call.dtype, call.out, piece.row + r, work.out + r * width, width);
  }
}

}  // namespace

void hstu_attention(const gr_attention_call& call, const Kernels& kernels) {
  if (!call.sequences) return;
  const int64_t qk = (int64_t)call.heads * call.d_qk, width = (int64_t)call.heads * call.d_v;
  const auto contiguous = [&](const void* data, int32_t columns) {
    return Rows{call.dtype, data, (int64_t)call.heads * columns, columns, call.heads, columns};
  };
  Call c{call, kernels, contiguous(call.q, call.d_qk), contiguous(call.k, call.d_qk),
         contiguous(call.v, call.d_v),
         shape_of(kernels, 0, call.heads, call.d_qk, call.d_v), {}, {}, {},
         nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
         0, 0, 0, 0, 0, 0, 0};
  const int64_t all = call.key_offsets[call.sequences] - call.key_offsets[0];
  int64_t longest = 0, blocks = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t keys = call.key_offsets[s + 1] - call.key_offsets[s];
    longest = std::max(longest, keys);
    c.first_block.push_back(blocks);
    blocks += (keys + kBlockTokens - 1) / kBlockTokens;
    for (int64_t row = call.query_offsets[s]; row < call.query_offsets[s + 1]; row += kRows) {
      const int64_t left = call.query_offsets[s + 1] - row;
      c.pieces.push_back({s, row, (int32_t)std::min<int64_t>(kRows, left)});
    }
  }
  const int64_t bytes = kernels.element_bytes;
  const int64_t block_bytes = call.heads * (c.shape.k_head_bytes + c.shape.v_head_bytes);
  Pool pool(std::max(1, call.threads));
  const int64_t workers = pool.threads();
  c.bias_stride = call.bias ? round_up(longest, kChunk) : 0;
  c.q_bytes = aligned((kRows * call.heads * c.shape.d_qk_padded + kSlack) * bytes);
  c.scores_bytes = aligned(kernels.scratch_bytes(&c.shape));
  c.sums_count = round_up((int64_t)kRows * c.shape.d_v_padded, kGroup);
  c.bias_count = call.bias ? kRows * (c.bias_stride + 1) : 0;
  c.rows_count = round_up(qk + width + kSlack, kGroup);
  c.out_count = round_up(kRows * width + kSlack, kGroup);
  uint8_t* block = nullptr;
  auto lay_out = [&](Layout layout) {
    block = layout.take<uint8_t>(blocks * block_bytes);
    c.own_k = layout.take<uint8_t>((all * call.heads * c.shape.d_qk_padded + kSlack) * bytes);
    c.own_v = layout.take<uint8_t>((all * call.heads * c.shape.d_v_padded + kSlack) * bytes);
    c.q = layout.take<uint8_t>(workers * c.q_bytes);
    c.scores = layout.take<uint8_t>(workers * c.scores_bytes);
    c.sums = layout.take<float>(workers * c.sums_count);
    c.bias = layout.take<float>(workers * c.bias_count);
    c.rows = layout.take<float>(workers * c.rows_count);
    c.out = layout.take<float>(workers * c.out_count);
    c.places = layout.take<RowPlace>(workers * kRows);
    return layout.used();
  };
  Memory memory;
  lay_out(Layout(memory.keep(lay_out(Layout(nullptr)))));
  for (int64_t i = 0; i < blocks; ++i) c.blocks.push_back((uint64_t)(block + i * block_bytes));
  pool.run(call.sequences, [](void* context, int64_t item, int worker) {
    pack_keys(*(const Call*)context, item, worker);
  }, &c);
  pool.run((int64_t)c.pieces.size(), [](void* context, int64_t item, int worker) {
    const Call& k = *(const Call*)context;
    attend_piece(k, k.pieces[item], worker);
  }, &c);
}

}  // namespace gr
