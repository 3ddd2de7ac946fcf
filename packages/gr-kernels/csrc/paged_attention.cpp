#include "paged_attention.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "rows.h"
#include "shape.h"

namespace gr {

namespace {

constexpr int64_t kSlack = 64;
constexpr int64_t kStored = 64;  // tokens of one piece of storing

std::shared_ptr<Workers> shared_workers(int threads) {
  static std::mutex mutex;
  // By process too: threads do not survive a fork.
  static std::map<std::pair<pid_t, int>, std::weak_ptr<Workers>> all;
  std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<Workers>& known = all[{getpid(), threads}];
  std::shared_ptr<Workers> workers = known.lock();
  if (!workers) known = workers = std::make_shared<Workers>(threads);
  return workers;
}

}  // namespace

// Rows of queries of one sequence.
struct PagedAttention::Piece {
  int64_t sequence, row, pair;  // pair: of the row's first bias
  int32_t count, first_place;   // its own place
};

struct PagedAttention::Batch {
  const PagedAttention& op;
  const gr_paged_call& call;
  Rows q_rows, k_rows, v_rows;
  std::vector<Piece> pieces;
  int64_t first = 0, end = 0;  // rows of sequences
  // Of each worker:
  uint8_t *q, *own_k, *own_v, *scores;  // (kRows, heads, padded) but for the scores
  float *sums, *bias, *rows, *out;
  RowPlace* places;
  uint8_t** blocks;
  int64_t q_bytes, own_v_bytes, scores_bytes, sums_count, bias_count, rows_count, out_count,
      block_count, bias_stride;
};

PagedAttention::PagedAttention(const gr_paged_config& config, const Kernels& kernels, int threads)
    : config_(config),
      kernels_(kernels),
      shape_(shape_of(kernels, 0, config.heads, config.d_qk, config.d_v)),
      page_bytes_(config.heads * (shape_.k_head_bytes + shape_.v_head_bytes)),
      workers_(shared_workers(threads)),
      zeros_((uint8_t*)memory_.keep(page_bytes_)) {
  std::memset(zeros_, 0, page_bytes_);
}

std::string PagedAttention::check(const gr_paged_call& call) const {
  const auto say = [](int64_t number) { return std::to_string(number); };
  if (call.sequences < 0 || call.tokens < 0 || call.page_stride < page_bytes_) {
    return "the sizes of the call are wrong";
  }
  if (call.query_offsets[0] < 0 || call.query_offsets[call.sequences] > call.tokens) {
    return "query_offsets are from " + say(call.query_offsets[0]) + " to " +
           say(call.query_offsets[call.sequences]) + "; expected 0 to " + say(call.tokens) +
           ", the tokens";
  }
  int64_t pairs = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t begin = call.query_offsets[s], end = call.query_offsets[s + 1];
    if (begin > end) return "query_offsets decrease at sequence " + say(s);
    if (end > call.tokens) return "query_offsets are beyond the tokens at sequence " + say(s);
    const int64_t keys = call.key_counts[s];
    pairs += (end - begin) * keys;
    if (keys < end - begin || keys > call.max_pages * kBlockTokens) {
      return "key_counts of sequence " + say(s) + " is " + say(keys) + "; expected at least its " +
             say(end - begin) + " new tokens and at most the " +
             say(call.max_pages * kBlockTokens) + " of a row of block_table";
    }
    int32_t lowest = INT32_MAX, highest = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int32_t low = call.low[row], high = call.high[row];
      if (low < 0 || high > keys) {
        return "token " + say(row) + " sees the keys from " + say(low) + " to " + say(high) +
               "; expected low from 0 and high at most " + say(keys) + ", the keys of sequence " +
               say(s);
      }
      if (low < high) lowest = std::min(lowest, low), highest = std::max(highest, high);
      if (call.slots[row] >= call.page_count * kBlockTokens) {
        return "slot " + say(call.slots[row]) + " of token " + say(row) + " is beyond the " +
               say(call.page_count) + " pages";
      }
    }
    const int32_t* table = call.block_table + s * call.table_stride;
    for (int64_t i = lowest / kBlockTokens; i * kBlockTokens < highest; ++i) {
      if (table[i] < 0 || table[i] >= call.page_count) {
        return "block_table[" + say(s) + ", " + say(i) + "] is " + say(table[i]) +
               "; expected 0 to " + say(call.page_count - 1);
      }
    }
  }
  if (call.bias && pairs != call.pairs) {
    return "bias has " + say(call.pairs) + " numbers; expected " + say(pairs) + ", one a pair";
  }
  return "";
}

void PagedAttention::run(const gr_paged_call& call) {
  if (!call.tokens) return;
  const int64_t heads = config_.heads, qk = heads * config_.d_qk, width = heads * config_.d_v;
  const int64_t bytes = kernels_.element_bytes;
  const auto rows_of = [&](const void* data, const int64_t* strides, int32_t columns) {
    return Rows{config_.dtype, data, strides[0], strides[1], config_.heads, columns};
  };
  Batch b{*this, call, rows_of(call.q, call.q_strides, config_.d_qk),
          rows_of(call.k, call.k_strides, config_.d_qk),
          rows_of(call.v, call.v_strides, config_.d_v), {}, call.query_offsets[0],
          call.query_offsets[call.sequences], nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
          nullptr, nullptr, nullptr, nullptr, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  const int64_t out_bytes = width * (config_.dtype == GR_FLOAT32 ? 4 : 2);
  std::memset(call.out, 0, b.first * out_bytes);
  std::memset((uint8_t*)call.out + b.end * out_bytes, 0, (call.tokens - b.end) * out_bytes);
  int64_t longest = 0, pair = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t begin = call.query_offsets[s], end = call.query_offsets[s + 1];
    const int64_t keys = call.key_counts[s];
    longest = std::max(longest, keys);
    for (int64_t row = begin; row < end; row += kRows) {
      const int32_t count = (int32_t)std::min<int64_t>(kRows, end - row);
      b.pieces.push_back({s, row, pair, count, (int32_t)(keys - (end - row))});
      pair += count * keys;
    }
  }
  std::lock_guard<std::mutex> lock(workers_->busy);
  const int64_t workers = workers_->pool.threads();
  b.bias_stride = call.bias ? round_up(longest, kChunk) : 0;
  b.q_bytes = aligned((kRows * heads * shape_.d_qk_padded + kSlack) * bytes);
  b.own_v_bytes = aligned((kRows * heads * shape_.d_v_padded + kSlack) * bytes);
  b.scores_bytes = aligned(kernels_.scratch_bytes(&shape_));
  b.sums_count = round_up((int64_t)kRows * shape_.d_v_padded, kGroup);
  b.bias_count = call.bias ? kRows * (b.bias_stride + 1) : 0;
  b.rows_count = round_up(qk + width + kSlack, kGroup);
  b.out_count = round_up(kRows * width + kSlack, kGroup);
  b.block_count = round_up(longest / kBlockTokens + 2, 8);
  const auto lay_out = [&](Layout layout) {
    b.q = layout.take<uint8_t>(workers * b.q_bytes);
    b.own_k = layout.take<uint8_t>(workers * b.q_bytes);
    b.own_v = layout.take<uint8_t>(workers * b.own_v_bytes);
    b.scores = layout.take<uint8_t>(workers * b.scores_bytes);
    b.sums = layout.take<float>(workers * b.sums_count);
    b.bias = layout.take<float>(workers * b.bias_count);
    b.rows = layout.take<float>(workers * b.rows_count);
    b.out = layout.take<float>(workers * b.out_count);
    b.places = layout.take<RowPlace>(workers * kRows);
    b.blocks = layout.take<uint8_t*>(workers * b.block_count);
    return layout.used();
  };
  lay_out(Layout(workers_->workspace.reserve(lay_out(Layout(nullptr)))));
  // All of it first: tokens of one piece see what another one stores.
  workers_->pool.run((b.end - b.first + kStored - 1) / kStored, [](void* c, int64_t item, int worker) {
    const Batch& batch = *(const Batch*)c;
    batch.op.store(batch, item, worker);
  }, &b);
  workers_->pool.run((int64_t)b.pieces.size(), [](void* c, int64_t item, int worker) {
    const Batch& batch = *(const Batch*)c;
    batch.op.attend(batch, batch.pieces[item], worker);
  }, &b);
}

void PagedAttention::store(const Batch& b, int64_t item, int worker) const {
  const int64_t first = b.first + item * kStored, end = std::min(first + kStored, b.end);
  float* scratch = b.rows + worker * b.rows_count;
  for (int64_t row = first; row < end; ++row) {
    const int64_t slot = b.call.slots[row];
    if (slot < 0) continue;
    const RowPlace at{(uint8_t*)b.call.pages + slot / kBlockTokens * b.call.page_stride,
                      (int32_t)(slot % kBlockTokens), -1};
    kernels_.place_token(&shape_, nullptr, 1.0f, b.k_rows.of(row, scratch),
                         b.v_rows.of(row, scratch + (int64_t)config_.heads * config_.d_qk), &at,
                         nullptr, nullptr, nullptr);
  }
}

void PagedAttention::attend(const Batch& b, const Piece& piece, int worker) const {
  const gr_paged_call& call = b.call;
  const int64_t heads = config_.heads, width = heads * config_.d_v;
  const int64_t keys = call.key_counts[piece.sequence];
  const int32_t *low = call.low + piece.row, *high = call.high + piece.row;
  uint8_t* q = b.q + worker * b.q_bytes;
  uint8_t* own_k = b.own_k + worker * b.q_bytes;
  uint8_t* own_v = b.own_v + worker * b.own_v_bytes;
  float* scratch = b.rows + worker * b.rows_count;
  RowPlace* places = b.places + worker * kRows;
  float* bias = call.bias ? b.bias + worker * b.bias_count : nullptr;
  float* own_bias = bias ? bias + kRows * b.bias_stride : nullptr;
  int32_t begin = INT32_MAX, end = 0;
  for (int r = 0; r < piece.count; ++r) {
    const int64_t row = piece.row + r;
    const int32_t own = piece.first_place + r;
    const bool apart = !(low[r] <= own && own < high[r]);
    if (low[r] < high[r]) begin = std::min(begin, low[r]), end = std::max(end, high[r]);
    places[r] = {nullptr, 0, apart ? r : -1};
    kernels_.place_token(&shape_, b.q_rows.of(row, scratch), config_.alpha, nullptr, nullptr,
                         nullptr, q + r * heads * shape_.d_qk_padded * kernels_.element_bytes,
                         nullptr, nullptr);
    if (apart) {
      kernels_.place_token(&shape_, nullptr, 1.0f, b.k_rows.of(row, scratch),
                           b.v_rows.of(row, scratch + heads * config_.d_qk), &places[r], nullptr,
                           own_k, own_v);
    }
    if (bias) {
      const float* given = call.bias + piece.pair + r * keys;
      std::memcpy(bias + r * b.bias_stride, given, keys * 4);
      std::fill(bias + r * b.bias_stride + keys, bias + (r + 1) * b.bias_stride, 0.0f);
      own_bias[r] = given[own];
    }
  }
  uint8_t** blocks = b.blocks + worker * b.block_count;
  if (begin < end) {
    const int32_t* table = call.block_table + piece.sequence * call.table_stride;
    const int64_t first = begin / kBlockTokens;
    // Products go by two pages; of the one that nobody sees, the table may name anything.
    if (first) blocks[first - 1] = zeros_;
    for (int64_t i = first; i * kBlockTokens < end; ++i) {
      blocks[i] = (uint8_t*)call.pages + table[i] * call.page_stride;
    }
  }
  Attend work;
  work.shape = &shape_;
  work.count = piece.count;
  work.q = q;
  work.low = low;
  work.high = high;
  work.places = places;
  work.own_k = own_k;
  work.own_v = own_v;
  work.blocks = blocks;
  work.layer_offset = 0;
  work.keys = end;  // What lies beyond may never have been stored.
  work.bias = bias;
  work.bias_stride = b.bias_stride;
  work.own_bias = own_bias;
  work.scale = 1.0f / config_.divisor;
  work.out = b.out + worker * b.out_count;
  work.scores = b.scores + worker * b.scores_bytes;
  work.sums = b.sums + worker * b.sums_count;
  {
    const Prepared prepared(kernels_, work.count);
    kernels_.attend(&work);
  }
  for (int r = 0; r < piece.count; ++r) {
    store_values(config_.dtype, call.out, piece.row + r, work.out + r * width, width);
  }
}

}  // namespace gr
