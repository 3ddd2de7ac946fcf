#include "stack.h"

#include <algorithm>
#include <cstring>

#include "shape.h"

namespace gr {

namespace {

// Reading past the last vector of a row must stay inside of a buffer.
constexpr int64_t kSlack = 64;

// Rows of a span are a multiple of what the kernels take at once.
constexpr int64_t kRowStep = 6;

}  // namespace

struct Stack::Batch {
  float* x;
  int64_t tokens;
  const gr_segment* segments;
  int32_t count;
  const int64_t* rows;          // first row of each segment
  std::vector<Span> spans;      // of the projection
  std::vector<Span> wanted;     // of the attention
  std::vector<Span> outputs;    // of the output

  RowPlace* places;             // (tokens)
  uint8_t* groups;              // (tokens) or null
  float* u;                     // (tokens, heads·d_v)
  uint8_t* q;                   // (tokens, heads, d_qk_padded) elements
  uint8_t* own_k;
  uint8_t* own_v;
  uint8_t* gated;               // (tokens, gated_stride) elements
  uint8_t* const* buckets;      // per segment (new + candidates, keys) time buckets, or null
  uint8_t* own_bucket;          // (tokens) of each row's own key, or null

  // Of each worker:
  uint8_t* panel;               // (kRows, d_model_stride) elements
  uint8_t* scratch;             // of the kernels
  float* sums;                  // (kRows, d_v_padded)
  float* attention;             // (kRows, heads·d_v)
  float* gate;                  // (2, heads·d_v)
  float* bias;                  // (kRows, bias_stride)
  int64_t panel_bytes, scratch_bytes, sums_count, attention_count, gate_count, bias_count;
  int64_t bias_stride;
};

Stack::Stack(const gr_stack_config& config, const gr_layer_weights* layers, const Kernels& kernels,
             int threads)
    : config_(config), kernels_(kernels), pool_(threads) {
  shape_ = shape_of(kernels, config.d_model, config.num_heads, config.d_qk, config.d_v);
  layer_bytes_ = shape_.heads * (shape_.k_head_bytes + shape_.v_head_bytes);
  if (config.time_buckets) {
    thresholds_.assign(config.time_thresholds, config.time_thresholds + config.time_buckets - 1);
  }
  const int64_t d = config.d_model, heads = config.num_heads;
  const int64_t width = heads * config.d_v, qk = heads * config.d_qk;
  const bool concatenates =
      config.gate == kUNormProduct || config.gate == kUAttentionProduct;
  gated_ = concatenates ? 3 * width : width;
  d_model_stride_ = round_up(d, kGroup);
  gated_stride_ = round_up(gated_, kGroup);
  for (int i = 0; i < config.num_layers; ++i) {
    const gr_layer_weights& w = layers[i];
    Layer layer;
    layer.input_norm = {keep(w.input_norm_weight, config.groups * d),
                        keep(w.input_norm_bias, config.groups * d), config.norm_eps};
    layer.attention_norm = {keep(w.attention_norm_weight, config.groups * width),
                            keep(w.attention_norm_bias, config.groups * width), config.norm_eps};
    const bool all = config.silu == GR_SILU_ALL, u = all || config.silu == GR_SILU_U;
    const float* weight = w.uvqk_weight;
    const float* bias = w.uvqk_bias;
    auto part = [&](Section section, int64_t first, int64_t columns, int head, bool silu,
                    float scale) {
      add_panels(layer.project, section, head, (int)columns, weight + first * d,
                 bias ? bias + first : nullptr, d, silu, scale);
    };
    part(Section::kU, 0, width, 0, u, 1.0f);
    for (int h = 0; h < heads; ++h) {
      part(Section::kQ, 2 * width + h * config.d_qk, config.d_qk, h, all, config.alpha);
    }
    layer.kv_first = layer.project.size();
    for (int h = 0; h < heads; ++h) {
      part(Section::kV, width + h * config.d_v, config.d_v, h, all, 1.0f);
      part(Section::kK, 2 * width + qk + h * config.d_qk, config.d_qk, h, all, 1.0f);
    }
    add_panels(layer.output, Section::kOutput, 0, (int)d, w.output_weight, w.output_bias, gated_,
               false, 1.0f);
    layer.position_bias = keep(w.position_bias, 2 * (int64_t)config.positions - 1);
    layer.time_bias = keep(w.time_bias, config.time_buckets);
    layers_.push_back(std::move(layer));
  }
}

const float* Stack::keep(const float* source, int64_t count) {
  if (!source) return nullptr;
  float* copy = (float*)weights_.keep((count + kSlack) * 4);
  std::memcpy(copy, source, count * 4);
  return copy;
}

void Stack::add_panels(std::vector<Panel>& panels, Section section, int head, int columns,
                       const float* weight, const float* bias, int64_t depth, bool silu,
                       float scale) {
  const int64_t padded_depth = round_up(depth, kernels_.step);
  for (int first = 0; first < columns; first += kMaxGroups * kGroup) {
    Panel panel;
    panel.section = section;
    panel.head = head;
    panel.column = first;
    panel.columns = std::min(columns - first, kMaxGroups * kGroup);
    panel.groups = (panel.columns + kGroup - 1) / kGroup;
    panel.silu = silu;
    panel.scale = scale;
    void* packed = weights_.keep(panel.groups * kGroup * padded_depth * kernels_.element_bytes);
    kernels_.pack(weight + first * depth, depth, panel.columns, depth, padded_depth, packed);
    panel.weight = packed;
    panel.bias = nullptr;
    if (bias) {
      float* padded = (float*)weights_.keep(kMaxGroups * kGroup * 4);
      std::fill(padded, padded + kMaxGroups * kGroup, 0.0f);
      std::memcpy(padded, bias + first, panel.columns * 4);
      panel.bias = padded;
    }
    panels.push_back(panel);
  }
}

std::string Stack::check(const float* x, int64_t tokens, const gr_segment* segments,
                         int32_t count) const {
  if (tokens < 0 || count < 0 || (tokens && !x) || (count && !segments)) {
    return "x or segments are missing";
  }
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) {
    const gr_segment& s = segments[i];
    const std::string where = "segment " + std::to_string(i) + ": ";
    if (s.cached < 0 || s.new_tokens < 0 || s.candidates < 0) return where + "a negative count";
    const int64_t keys = (int64_t)s.cached + s.new_tokens, n = (int64_t)s.new_tokens + s.candidates;
    if (keys > INT32_MAX / 2) return where + "too many tokens";
    rows += n;
    if (!n) continue;
    if (!s.low || !s.high) return where + "no intervals";
    if (keys && !s.blocks) return where + "no blocks";
    for (int64_t b = 0; b * kBlockTokens < keys; ++b) {
      if (!s.blocks[b] || s.blocks[b] % kAlignment) return where + "a block is not aligned to 64";
    }
    for (int64_t r = 0; r < n; ++r) {
      if (s.low[r] < 0 || s.high[r] > keys) {
        return where + "row " + std::to_string(r) + " sees keys " + std::to_string(s.low[r]) +
               " to " + std::to_string(s.high[r]) + " of " + std::to_string(keys);
      }
    }
    if (config_.groups > 1) {
      if (!s.groups) return where + "no groups";
      for (int64_t r = 0; r < n; ++r) {
        if (s.groups[r] >= config_.groups) return where + "a group that the stack has not";
      }
    }
    if (config_.time_buckets && (!s.times || !s.next_times)) return where + "no times";
    // Candidates stand where the token after the history would.
    const int64_t places = keys + (s.candidates ? 1 : 0);
    if (config_.positions && places > config_.positions) {
      return where + std::to_string(places) + " positions, but biases of " +
             std::to_string(config_.positions);
    }
  }
  if (rows != tokens) {
    return "x has " + std::to_string(tokens) + " rows, the segments have " + std::to_string(rows);
  }
  return "";
}

uint8_t Stack::bucket_of(int64_t one, int64_t other) const {
  // In unsigned arithmetic, where nothing overflows.
  const uint64_t gap = one > other ? (uint64_t)one - (uint64_t)other
                                   : (uint64_t)other - (uint64_t)one;
  return (uint8_t)(std::upper_bound(thresholds_.begin(), thresholds_.end(), gap) -
                   thresholds_.begin());
}

// Spans of at most kRows rows; only history rows whose output nobody reads are K and V alone.
void Stack::plan(Batch& batch, bool last) const {
  batch.spans.clear();
  batch.wanted.clear();
  batch.outputs.clear();
  // As many spans as give every thread the same number of them, while a few are all that there are.
  const int64_t spans = (batch.tokens + kRows - 1) / kRows, threads = pool_.threads();
  const int64_t even = round_up(spans, threads);
  const bool few = spans < 4 * threads;
  const int64_t most = few ? round_up((batch.tokens + even - 1) / even, kRowStep) : kRows;
  auto add = [most](std::vector<Span>& spans, int64_t row, int64_t count, int segment,
                    bool kv_only) {
    for (int64_t i = 0; i < count; i += most) {
      spans.push_back({row + i, (int32_t)std::min(most, count - i), segment, kv_only});
    }
  };
  // Of the phases that know no segments, rows that follow each other go together.
  int64_t full_row = 0, full_count = 0;
  auto flush = [&] {
    add(batch.spans, full_row, full_count, -1, false);
    add(batch.outputs, full_row, full_count, -1, false);
    full_count = 0;
  };
  for (int i = 0; i < batch.count; ++i) {
    const gr_segment& s = batch.segments[i];
    int64_t unread = 0;
    if (last) {
      unread = s.rows == GR_ROWS_ALL          ? 0
               : s.rows == GR_ROWS_AND_LAST ? std::max(0, s.new_tokens - 1)
                                            : s.new_tokens;
    }
    const int64_t row = batch.rows[i], end = row + s.new_tokens + s.candidates;
    if (unread) {
      flush();
      add(batch.spans, row, unread, -1, true);
    }
    if (!full_count) full_row = row + unread;
    full_count += end - row - unread;
    add(batch.wanted, row + unread, end - row - unread, i, false);
  }
  flush();
}

void Stack::run(float* x, int64_t tokens, const gr_segment* segments, int32_t count) {
  if (!tokens) return;
  const int64_t bytes = kernels_.element_bytes, heads = shape_.heads;
  const int64_t width = heads * shape_.d_v;
  const bool timed = config_.time_buckets > 0, biased = timed || config_.positions > 0;
  Batch batch;
  batch.x = x;
  batch.tokens = tokens;
  batch.segments = segments;
  batch.count = count;
  int64_t own = 0, longest = 0, pairs = 0;
  for (int i = 0; i < count; ++i) {
    const gr_segment& s = segments[i];
    const int64_t keys = (int64_t)s.cached + s.new_tokens;
    longest = std::max(longest, keys);
    pairs += aligned((s.new_tokens + s.candidates) * keys);
    own += s.candidates;
    for (int r = 0; r < s.new_tokens; ++r) {
      own += !(s.low[r] <= s.cached + r && s.cached + r < s.high[r]);
    }
  }
  batch.bias_stride = biased ? round_up(longest, kChunk) : 0;
  batch.panel_bytes = aligned(kRows * d_model_stride_ * bytes);
  batch.scratch_bytes = aligned(kernels_.scratch_bytes(&shape_));
  batch.sums_count = round_up(kRows * (int64_t)shape_.d_v_padded, kGroup);
  batch.attention_count = round_up(kRows * width + kSlack, kGroup);
  batch.gate_count = round_up(2 * width + kSlack, kGroup);
  batch.bias_count = biased ? kRows * (batch.bias_stride + 1) : 0;
  int64_t* rows = nullptr;
  uint8_t** buckets = nullptr;
  uint8_t* bucket = nullptr;
  const int threads = pool_.threads();
  auto lay_out = [&](Layout layout) {
    rows = layout.take<int64_t>(count);
    buckets = layout.take<uint8_t*>(count);
    batch.places = layout.take<RowPlace>(tokens);
    batch.groups = config_.groups > 1 ? layout.take<uint8_t>(tokens) : nullptr;
    batch.u = layout.take<float>(tokens * width + kSlack);
    batch.q = layout.take<uint8_t>((tokens * heads * shape_.d_qk_padded + kSlack) * bytes);
    batch.own_k = layout.take<uint8_t>((own * heads * shape_.d_qk_padded + kSlack) * bytes);
    batch.own_v = layout.take<uint8_t>((own * heads * shape_.d_v_padded + kSlack) * bytes);
    batch.gated = layout.take<uint8_t>((tokens * gated_stride_ + kSlack) * bytes);
    batch.panel = layout.take<uint8_t>(threads * batch.panel_bytes);
    batch.scratch = layout.take<uint8_t>(threads * batch.scratch_bytes);
    batch.sums = layout.take<float>(threads * batch.sums_count);
    batch.attention = layout.take<float>(threads * batch.attention_count);
    batch.gate = layout.take<float>(threads * batch.gate_count);
    batch.bias = layout.take<float>(threads * batch.bias_count);
    batch.own_bucket = timed ? layout.take<uint8_t>(tokens) : nullptr;
    bucket = timed ? layout.take<uint8_t>(pairs) : nullptr;
    return layout.used();
  };
  const int64_t needed = lay_out(Layout(nullptr));
  lay_out(Layout(workspace_.reserve(needed)));
  batch.rows = rows;
  batch.buckets = timed ? buckets : nullptr;

  int64_t row = 0;
  int32_t own_row = 0;
  for (int i = 0; i < count; ++i) {
    const gr_segment& s = segments[i];
    rows[i] = row;
    const int n = s.new_tokens + s.candidates;
    for (int r = 0; r < n; ++r) {
      RowPlace& place = batch.places[row + r];
      const int token = s.cached + r;
      const bool history = r < s.new_tokens;
      const bool covered = history && s.low[r] <= token && token < s.high[r];
      place.block = history ? (uint8_t*)s.blocks[token / kBlockTokens] : nullptr;
      place.slot = token % kBlockTokens;
      place.own = covered ? -1 : own_row++;
    }
    if (batch.groups && n) std::memcpy(batch.groups + row, s.groups, n);
    if (timed) {
      const int keys = s.cached + s.new_tokens;
      buckets[i] = bucket;
      for (int r = 0; r < n; ++r) {
        for (int j = 0; j < keys; ++j) {
          bucket[(int64_t)r * keys + j] = bucket_of(s.next_times[r], s.times[j]);
        }
        batch.own_bucket[row + r] = bucket_of(s.next_times[r], s.times[s.cached + r]);
      }
      bucket += aligned((int64_t)n * keys);
    }
    row += n;
  }

  struct Call {
    Stack* stack;
    Batch* batch;
    const Layer* layer;
    int64_t offset;
  } call{this, &batch, nullptr, 0};
  plan(batch, layers_.size() == 1);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (i > 0 && i + 1 == layers_.size()) plan(batch, true);
    call.layer = &layers_[i];
    call.offset = layer_bytes_ * (int64_t)i;
    pool_.run((int64_t)batch.spans.size(), [](void* c, int64_t item, int worker) {
      const Call& k = *(Call*)c;
      k.stack->project(*k.batch, *k.layer, k.offset, item, worker);
    }, &call);
    pool_.run((int64_t)batch.wanted.size(), [](void* c, int64_t item, int worker) {
      const Call& k = *(Call*)c;
      k.stack->attend(*k.batch, *k.layer, k.offset, item, worker);
    }, &call);
    pool_.run((int64_t)batch.outputs.size(), [](void* c, int64_t item, int worker) {
      const Call& k = *(Call*)c;
      k.stack->output(*k.batch, *k.layer, item, worker);
    }, &call);
  }
}

void Stack::project(const Batch& batch, const Layer& layer, int64_t offset, int64_t item,
                    int worker) {
  const Span& span = batch.spans[item];
  const int64_t bytes = kernels_.element_bytes;
  uint8_t* panel = batch.panel + worker * batch.panel_bytes;
  kernels_.norm_rows(batch.x + span.row * shape_.d_model, span.count, shape_.d_model,
                     &layer.input_norm, batch.groups ? batch.groups + span.row : nullptr, panel,
                     d_model_stride_);
  Linear work;
  work.shape = &shape_;
  work.rows = panel;
  work.stride = d_model_stride_;
  work.depth = round_up(shape_.d_model, kernels_.step) / kernels_.step;
  work.count = span.count;
  work.u = batch.u + span.row * shape_.heads * shape_.d_v;
  work.q = batch.q + span.row * shape_.heads * shape_.d_qk_padded * bytes;
  work.x = nullptr;
  work.places = batch.places + span.row;
  work.layer_offset = offset;
  work.own_k = batch.own_k;
  work.own_v = batch.own_v;
  work.scratch = batch.scratch + worker * batch.scratch_bytes;
  const Prepared prepared(kernels_, span.count);
  for (size_t p = span.kv_only ? layer.kv_first : 0; p < layer.project.size(); ++p) {
    work.panel = &layer.project[p];
    kernels_.linear(&work);
  }
}

// Biases of the rows' keys, and after all rows those of their own keys.
const float* Stack::bias(const Batch& batch, const Layer& layer, const Span& span, int worker) {
  if (!batch.bias_count) return nullptr;
  const gr_segment& s = batch.segments[span.segment];
  const int64_t first = span.row - batch.rows[span.segment];
  const int64_t keys = s.cached + s.new_tokens;
  float* bias = batch.bias + worker * batch.bias_count;
  for (int r = 0; r < span.count; ++r) {
    float* row = bias + r * batch.bias_stride;
    float own = 0.0f;
    std::fill(row, row + batch.bias_stride, 0.0f);
    if (layer.position_bias) {
      const int64_t token = std::min(s.cached + first + r, keys);
      const float* same = layer.position_bias + config_.positions - 1;
      std::memcpy(row, same - token, 4 * keys);
      own = *same;
    }
    if (layer.time_bias) {
      const uint8_t* bucket = batch.buckets[span.segment] + (first + r) * keys;
      for (int64_t j = 0; j < keys; ++j) row[j] += layer.time_bias[bucket[j]];
      own += layer.time_bias[batch.own_bucket[span.row + r]];
    }
    bias[kRows * batch.bias_stride + r] = own;
  }
  return bias;
}

void Stack::attend(const Batch& batch, const Layer& layer, int64_t offset, int64_t item,
                   int worker) {
  const Span& span = batch.wanted[item];
  const gr_segment& s = batch.segments[span.segment];
  const int64_t first = span.row - batch.rows[span.segment];
  const int64_t bytes = kernels_.element_bytes;
  float* attention = batch.attention + worker * batch.attention_count;
  Attend work;
  work.shape = &shape_;
  work.count = span.count;
  work.q = batch.q + span.row * shape_.heads * shape_.d_qk_padded * bytes;
  work.low = s.low + first;
  work.high = s.high + first;
  work.places = batch.places + span.row;
  work.own_k = batch.own_k;
  work.own_v = batch.own_v;
  work.blocks = (uint8_t* const*)s.blocks;
  work.layer_offset = offset;
  work.keys = s.cached + s.new_tokens;
  work.bias = bias(batch, layer, span, worker);
  work.bias_stride = batch.bias_stride;
  work.own_bias = work.bias ? work.bias + kRows * batch.bias_stride : nullptr;
  work.scale = 1.0f / config_.divisor;
  work.out = attention;
  work.scores = batch.scratch + worker * batch.scratch_bytes;
  work.sums = batch.sums + worker * batch.sums_count;
  {
    const Prepared prepared(kernels_, span.count);
    kernels_.attend(&work);
  }
  kernels_.gate_rows(config_.gate, config_.head_norm, batch.u + span.row * shape_.heads * shape_.d_v,
                     attention, span.count, shape_.heads, shape_.d_v, &layer.attention_norm,
                     batch.groups ? batch.groups + span.row : nullptr,
                     batch.gate + worker * batch.gate_count,
                     batch.gated + span.row * gated_stride_ * bytes, gated_stride_);
}

void Stack::output(const Batch& batch, const Layer& layer, int64_t item, int worker) {
  const Span& span = batch.outputs[item];
  Linear work;
  work.shape = &shape_;
  work.rows = batch.gated + span.row * gated_stride_ * kernels_.element_bytes;
  work.stride = gated_stride_;
  work.depth = round_up(gated_, kernels_.step) / kernels_.step;
  work.count = span.count;
  work.u = nullptr;
  work.q = nullptr;
  work.x = batch.x + span.row * shape_.d_model;
  work.places = nullptr;
  work.layer_offset = 0;
  work.own_k = work.own_v = nullptr;
  work.scratch = batch.scratch + worker * batch.scratch_bytes;
  const Prepared prepared(kernels_, span.count);
  for (const Panel& panel : layer.output) {
    work.panel = &panel;
    kernels_.linear(&work);
  }
}

}  // namespace gr
