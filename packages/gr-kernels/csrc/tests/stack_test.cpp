// Every instruction set of this processor against the equations in double: right on odd shapes and
// variants, and the same bits however a request is split, on memory that holds NaN. Without Python,
// so that it also runs, linked statically, on a processor that is only emulated.
//
// Shapes: T = N + C tokens, N of the history and C candidates, D model width, H heads.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../gr_kernels.h"

namespace {

enum Mask { kCausal, kWindow, kPrefix, kArbitrary };

struct Case {
  const char* name;
  int d_model, heads, d_qk, d_v, layers, silu, gate, head_norm, groups, positions, time_buckets;
  Mask mask;
  int history, candidates;
};

// Odd widths leave tails of rows, of k and of columns; the lengths, those of tiles and blocks.
const Case kCases[] = {
    {"ranking", 64, 2, 32, 32, 2, 1, 2, 0, 1, 0, 0, kCausal, 70, 9},
    {"usual heads", 128, 2, 64, 64, 1, 1, 2, 1, 1, 0, 0, kCausal, 129, 33},
    {"research", 40, 2, 16, 24, 2, 2, 0, 0, 1, 150, 12, kWindow, 57, 20},
    {"odd heads", 50, 2, 25, 33, 1, 2, 1, 1, 3, 0, 0, kPrefix, 65, 5},
    {"groups", 24, 3, 16, 16, 2, 1, 3, 0, 3, 0, 7, kArbitrary, 100, 48},
    {"narrow", 3, 1, 3, 5, 1, 0, 2, 0, 1, 0, 0, kCausal, 33, 1},
    {"wide heads", 48, 1, 130, 130, 1, 1, 2, 0, 1, 300, 0, kArbitrary, 200, 17},
    {"no history", 64, 2, 32, 16, 1, 1, 2, 0, 1, 0, 0, kCausal, 0, 19},
    {"no candidates", 64, 2, 48, 80, 1, 1, 2, 0, 1, 0, 0, kCausal, 47, 0},
    {"one token", 64, 2, 64, 64, 1, 1, 2, 0, 1, 0, 0, kCausal, 1, 1},
};

struct Layer {
  std::vector<float> input_weight, input_bias, uvqk, uvqk_bias, norm_weight, norm_bias, output,
      output_bias, position, time;
};

struct Problem {
  Case c;
  std::vector<int64_t> thresholds;
  std::vector<Layer> layers;
  std::vector<float> x;
  std::vector<int32_t> low, high;
  std::vector<uint8_t> groups;
  std::vector<int64_t> times, next_times;
  float alpha, divisor = 20.0f, eps = 1e-6f;

  int tokens() const { return c.history + c.candidates; }
  int width() const { return c.heads * c.d_v; }
  int qk() const { return c.heads * c.d_qk; }
  int gated() const { return width() * (c.gate == 1 || c.gate == 2 ? 3 : 1); }
};

Problem make(const Case& c, unsigned seed) {
  Problem p{c, {}, {}, {}, {}, {}, {}, {}, {}, 1.0f / std::sqrt((float)c.d_qk)};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto numbers = [&](size_t n, float scale, float around = 0.0f) {
    std::vector<float> made(n);
    for (float& value : made) value = around + scale * normal(random);
    return made;
  };
  const int columns = 2 * p.width() + 2 * p.qk();
  for (int i = 0; i < c.layers; ++i) {
    Layer layer;
    layer.input_weight = numbers(c.groups * c.d_model, 0.3f, 1.0f);
    layer.input_bias = numbers(c.groups * c.d_model, 0.3f);
    layer.uvqk = numbers((size_t)columns * c.d_model, 1.0f / std::sqrt((float)c.d_model));
    layer.uvqk_bias = numbers(columns, 0.3f);
    layer.norm_weight = numbers(c.groups * p.width(), 0.3f, 1.0f);
    layer.norm_bias = numbers(c.groups * p.width(), 0.3f);
    layer.output = numbers((size_t)c.d_model * p.gated(), 1.0f / std::sqrt((float)p.gated()));
    layer.output_bias = numbers(c.d_model, 0.3f);
    if (c.positions) layer.position = numbers(2 * c.positions - 1, 1.0f);
    layer.time = numbers(c.time_buckets, 1.0f);
    p.layers.push_back(layer);
  }
  for (int i = 1; i < c.time_buckets; ++i) p.thresholds.push_back((int64_t)1 << i);
  p.x = numbers((size_t)p.tokens() * c.d_model, 1.0f);
  const auto below = [&](int n) { return (int)(random() % (unsigned)n); };
  const int prefix = c.history < 3 ? c.history : 3;
  for (int i = 0; i < p.tokens(); ++i) {
    const int position = i < c.history ? i : c.history;
    int low = 0, high = position;
    if (c.mask == kWindow) low = position > 20 ? position - 20 : 0;
    if (c.mask == kPrefix && i < prefix) high = c.history;
    if (c.mask == kArbitrary) {
      low = below(position + 1);
      high = below(position + 1);
    }
    p.low.push_back(low);
    p.high.push_back(high);
    p.groups.push_back((uint8_t)below(c.groups));
    p.times.push_back(1000 + 7 * i + below(5));
    p.next_times.push_back(p.times.back() + below(900));
  }
  return p;
}

// ── The equations ───────────────────────────────────────────────────────────────────────────

typedef std::vector<double> Row;

double silu(double x) { return x / (1.0 + std::exp(-x)); }

void norm(Row& x, int parts, const float* weight, const float* bias, double eps) {
  const size_t n = x.size() / parts;
  for (int part = 0; part < parts; ++part) {
    double mean = 0.0, variance = 0.0;
    for (size_t i = 0; i < n; ++i) mean += x[part * n + i] / n;
    for (size_t i = 0; i < n; ++i) {
      variance += (x[part * n + i] - mean) * (x[part * n + i] - mean) / n;
    }
    for (size_t i = part * n; i < (part + 1) * n; ++i) {
      x[i] = (x[i] - mean) / std::sqrt(variance + eps) * weight[i] + bias[i];
    }
  }
}

Row multiply(const std::vector<float>& matrix, const std::vector<float>& bias, const Row& x) {
  Row y(bias.begin(), bias.end());
  for (size_t i = 0; i < y.size(); ++i) {
    for (size_t k = 0; k < x.size(); ++k) y[i] += (double)matrix[i * x.size() + k] * x[k];
  }
  return y;
}

std::vector<double> reference(const Problem& p) {
  const Case& c = p.c;
  const int t = p.tokens(), width = p.width(), qk = p.qk();
  std::vector<Row> x(t), uvqk(t);
  for (int i = 0; i < t; ++i) {
    x[i].assign(p.x.begin() + (size_t)i * c.d_model, p.x.begin() + (size_t)(i + 1) * c.d_model);
  }
  for (const Layer& layer : p.layers) {
    for (int i = 0; i < t; ++i) {
      const int group = c.groups > 1 ? p.groups[i] : 0;
      Row normed = x[i];
      norm(normed, 1, &layer.input_weight[group * c.d_model], &layer.input_bias[group * c.d_model],
           p.eps);
      uvqk[i] = multiply(layer.uvqk, layer.uvqk_bias, normed);
      const int activated = c.silu == 2 ? (int)uvqk[i].size() : c.silu == 1 ? width : 0;
      for (int n = 0; n < activated; ++n) uvqk[i][n] = silu(uvqk[i][n]);
    }
    for (int i = 0; i < t; ++i) {
      Row a(width), u(uvqk[i].begin(), uvqk[i].begin() + width);
      const int position = i < c.history ? i : c.history;
      for (int j = 0; j < t; ++j) {
        const bool seen = j < c.history && p.low[i] <= j && j < p.high[i];
        if (!seen && j != i) continue;
        double bias = 0.0;
        if (c.positions) {
          bias += layer.position[(j < c.history ? j : c.history) - position + c.positions - 1];
        }
        if (c.time_buckets) {
          const int64_t gap = std::llabs(p.next_times[i] - p.times[j]);
          int bucket = 0;
          while (bucket < c.time_buckets - 1 && gap >= p.thresholds[bucket]) ++bucket;
          bias += layer.time[bucket];
        }
        for (int h = 0; h < c.heads; ++h) {
          double score = 0.0;
          for (int k = 0; k < c.d_qk; ++k) {
            score += uvqk[i][2 * width + h * c.d_qk + k] * uvqk[j][2 * width + qk + h * c.d_qk + k];
          }
          const double weight = silu(p.alpha * score + bias) / p.divisor;
          for (int k = 0; k < c.d_v; ++k) {
            a[h * c.d_v + k] += weight * uvqk[j][width + h * c.d_v + k];
          }
        }
      }
      const int group = c.groups > 1 ? p.groups[i] : 0;
      Row normed = a;
      if (c.gate == 3) {
        for (int k = 0; k < width; ++k) normed[k] *= u[k];
      }
      norm(normed, c.head_norm ? c.heads : 1, &layer.norm_weight[group * width],
           &layer.norm_bias[group * width], p.eps);
      Row product = normed, gated;
      for (int k = 0; k < width; ++k) product[k] *= u[k];
      if (c.gate == 0) gated = product;
      if (c.gate == 3) gated = normed;
      if (c.gate == 1 || c.gate == 2) {
        gated = u;
        const Row& second = c.gate == 1 ? normed : a;
        gated.insert(gated.end(), second.begin(), second.end());
        gated.insert(gated.end(), product.begin(), product.end());
      }
      const Row y = multiply(layer.output, layer.output_bias, gated);
      for (int k = 0; k < c.d_model; ++k) x[i][k] += y[k];
    }
  }
  std::vector<double> all;
  for (const Row& row : x) all.insert(all.end(), row.begin(), row.end());
  return all;
}

// ── The kernels ─────────────────────────────────────────────────────────────────────────────

class Runner {
 public:
  Runner(const Problem& p, int dtype, const std::string& isa, int threads) : p_(p) {
    const Case& c = p.c;
    gr_stack_config config = {};
    config.d_model = c.d_model;
    config.num_heads = c.heads;
    config.d_qk = c.d_qk;
    config.d_v = c.d_v;
    config.num_layers = c.layers;
    config.dtype = dtype;
    config.silu = c.silu;
    config.gate = c.gate;
    config.head_norm = c.head_norm;
    config.groups = c.groups;
    config.alpha = p.alpha;
    config.divisor = p.divisor;
    config.norm_eps = p.eps;
    config.positions = c.positions;
    config.time_buckets = c.time_buckets;
    config.time_thresholds = p.thresholds.data();
    std::vector<gr_layer_weights> layers;
    for (const Layer& l : p.layers) {
      layers.push_back({l.input_weight.data(), l.input_bias.data(), l.uvqk.data(),
                        l.uvqk_bias.data(), l.norm_weight.data(), l.norm_bias.data(),
                        l.output.data(), l.output_bias.data(),
                        c.positions ? l.position.data() : nullptr,
                        c.time_buckets ? l.time.data() : nullptr});
    }
    stack_ = gr_stack_create(&config, layers.data(), isa.c_str(), threads);
    if (!stack_) {
      std::printf("FAILED: %s\n", gr_last_error());
      std::exit(1);
    }
    const int64_t bytes = gr_stack_block_bytes(stack_);
    const int count = (c.history + GR_BLOCK_TOKENS - 1) / GR_BLOCK_TOKENS;
    memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64 * (count + 1));
    std::memset(memory_, 0xFF, bytes * count);  // NaN in each format
    for (int i = 0; i < count; ++i) blocks_.push_back((uint64_t)memory_ + bytes * i);
  }
  ~Runner() {
    gr_stack_destroy(stack_);
    std::free(memory_);
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  // The tokens from `start` to `stop`, those before being in the blocks.
  std::vector<float> run(int start, int stop) {
    const int n = p_.c.history, cached = start < n ? start : n, keys = stop < n ? stop : n;
    std::vector<int64_t> times(p_.times.begin(), p_.times.begin() + keys);
    times.insert(times.end(), p_.times.begin() + (start > n ? start : n < stop ? n : stop),
                 p_.times.begin() + stop);
    gr_segment segment = {};
    segment.blocks = blocks_.data();
    segment.low = p_.low.data() + start;
    segment.high = p_.high.data() + start;
    segment.groups = p_.groups.data() + start;
    segment.times = times.data();
    segment.next_times = p_.next_times.data() + start;
    segment.cached = cached;
    segment.new_tokens = keys - cached;
    segment.candidates = stop - (start > n ? start : n < stop ? n : stop);
    segment.rows = GR_ROWS_ALL;
    const int64_t d = p_.c.d_model;
    std::vector<float> x(p_.x.begin() + start * d, p_.x.begin() + stop * d);
    if (gr_stack_run(stack_, x.data(), stop - start, &segment, 1) != GR_OK) {
      std::printf("FAILED: %s\n", gr_last_error());
      std::exit(1);
    }
    return x;
  }

 private:
  const Problem& p_;
  gr_stack* stack_;
  void* memory_;
  std::vector<uint64_t> blocks_;
};

// Relative to what the layers add.
double error(const Problem& p, const std::vector<float>& found, const std::vector<double>& right) {
  double wrong = 0.0, all = 0.0;
  for (size_t i = 0; i < right.size(); ++i) {
    wrong += (found[i] - right[i]) * (found[i] - right[i]);
    all += (right[i] - p.x[i]) * (right[i] - p.x[i]);
  }
  return std::sqrt(wrong / all);
}

}  // namespace

int main() {
  int failures = 0;
  std::printf("float32: %s\n", gr_instruction_sets(GR_FLOAT32));
  std::printf("bfloat16: %s\n", gr_instruction_sets(GR_BFLOAT16));
  if (*gr_amx_absence()) std::printf("amxbf16: skipped: %s\n", gr_amx_absence());
  unsigned seed = 0;
  for (const Case& c : kCases) {
    const Problem p = make(c, ++seed);
    const std::vector<double> right = reference(p);
    for (int dtype : {GR_FLOAT32, GR_BFLOAT16}) {
      // bfloat16 has 8 bits, and a unit in the last place of each product's factors adds up.
      const double allowed = dtype == GR_FLOAT32 ? 1e-5 : 1.5e-2;
      std::istringstream sets(gr_instruction_sets(dtype));
      for (std::string isa; sets >> isa;) {
        const std::vector<float> whole = Runner(p, dtype, isa, 1).run(0, p.tokens());
        const double off = error(p, whole, right);
        bool same = true;
        for (int step : {1, 7, 32, 50}) {
          // Splits where no token sees one of a later piece.
          if (c.mask == kPrefix) break;
          if (step == 1 && p.tokens() > 80) continue;
          Runner runner(p, dtype, isa, 2);
          for (int start = 0; start < p.tokens(); start += step) {
            const int stop = start + step < p.tokens() ? start + step : p.tokens();
            const std::vector<float> part = runner.run(start, stop);
            same &= !std::memcmp(part.data(), &whole[(size_t)start * c.d_model], 4 * part.size());
          }
        }
        const bool ok = off <= allowed && same;
        failures += !ok;
        std::printf("%s %-13s %-10s off by %.2e%s\n", ok ? "ok    " : "FAILED", c.name, isa.c_str(),
                    off, same ? "" : ", other bits in pieces");
        std::fflush(stdout);
      }
    }
  }
  std::printf(failures ? "%d FAILED\n" : "all right\n", failures);
  return failures != 0;
}
