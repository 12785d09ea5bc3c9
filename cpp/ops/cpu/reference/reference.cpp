// The reference backend: every small operator written the obvious way, accumulating in double. Never optimised.
//
// It is the oracle of every other backend. Weights stay in file layout, one row after another. Only the int8 product
// follows a stated order in f32, because fast backends must equal it bit for bit.
#include "ops/cpu/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/dtype.h"
#include "base/ids.h"
#include "ops/cpu/reference/int4_keys.h"
#include "quant/format.h"
#include "quant/kv_format.h"

namespace nb::ops {
namespace {

// The share of [0, size) that belongs to a part.
struct Range {
  int begin, end;
};
Range share(int size, const Part& part) {
  const auto at = [&](int index) { return static_cast<int>(static_cast<int64_t>(size) * index / part.count); };
  return {at(part.index), at(part.index + 1)};
}

void embed(const EmbedArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    quant::unpack_row(a.table.format, a.table.data + a.ids[t] * a.table.strip_bytes, a.table.cols,
                      a.out + t * a.out_stride);
  }
}

void rms_norm(const RmsNormArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    const float* x = a.x + t * a.x_stride;
    double sum = 0.0;
    for (int i = 0; i < a.cols; ++i) sum += static_cast<double>(x[i]) * x[i];
    const double inverse = 1.0 / std::sqrt(sum / a.cols + static_cast<double>(a.eps));
    for (int i = 0; i < a.cols; ++i) a.out[t * a.out_stride + i] = static_cast<float>(x[i] * inverse * a.weight[i]);
  }
}

// Source of the recipe: symmetric, scale = max|x| / 127, round to nearest even.
void quantize_group(const float* x, const Activation& out, int64_t group) {
  float largest = 0.0f;
  for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) {
    const auto code = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
    out.codes[32 * group + i] = code;
    sum += code;
    if (i == 15) out.minus_half_sums[group] = -sum;
  }
  out.minus_sums[group] = -sum;
  out.scales[group] = largest / 127.0f;
  out.shifts[group] = out.scales[group] * static_cast<float>(sum);
}

void prepare(const PrepareArgs& a, const Part& part) {
  const Activation& out = a.out;
  const Range rows = share(out.rows, part);
  std::vector<float> row(static_cast<size_t>(out.cols));
  for (int t = rows.begin; t < rows.end; ++t) {
    std::copy_n(a.x + t * a.x_stride, a.cols, row.begin());
    if (out.type == ActType::int8) {
      for (int g = 0; g < out.cols / 32; ++g) {
        quantize_group(row.data() + 32 * g, out, static_cast<int64_t>(t) * (out.cols / 32) + g);
      }
    } else {
      for (int i = 0; i < out.cols; ++i) {
        const float value = row[static_cast<size_t>(i)];
        out.values[static_cast<int64_t>(t) * out.cols + i] =
            out.type == ActType::bf16 ? bf16_to_f32(f32_to_bf16(value)) : value;
      }
    }
  }
}

uint16_t load_u16(const uint8_t* bytes) {
  uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// One output of an int8 product. The order is part of the contract: one f32 chain per output, groups ascending; for
// each scale of the weight its exact integer sum in one fused multiply-add (a group of 32, or two halves where a format
// has sub-blocks of 16), then the minimum's. The two groups of a block of w4 share a minimum: theirs comes once, after
// the second, times the sum of their shifts.
float dot_int8(const LinearSegment& w, int row, const Activation& x, int t) {
  const quant::FormatInfo& info = quant::format_info(w.format);
  const int scale_cols = w.format == quant::Format::q6_k ? 16 : 32;
  float result = 0.0f;
  for (int g = 0; g < x.cols / 32; ++g) {
    quant::CodeGroup weights;
    info.read_group(w.data + row * w.strip_bytes, g, std::min(32, w.cols - 32 * g), weights);
    const int64_t group = static_cast<int64_t>(t) * (x.cols / 32) + g;
    const int8_t* codes = x.codes + 32 * group;
    for (int begin = 0; begin < 32; begin += scale_cols) {
      int32_t sum = 0;
      for (int i = begin; i < begin + scale_cols; ++i) sum += (weights.codes[i] - info.zero_of(weights)) * codes[i];
      result = std::fmaf(static_cast<float>(sum), weights.scales[begin / 16] * x.scales[group], result);
    }
    if (w.format == quant::Format::w4) {
      if (g % 2 == 1) result = std::fmaf(weights.minimum, x.shifts[group - 1] + x.shifts[group], result);
    } else if (info.has_minimum) {
      result = std::fmaf(weights.minimum, x.shifts[group], result);
    }
  }
  return result;
}

void linear(const LinearArgs& a, const Part& part) {
  const LinearSegment& w = a.weight;
  const Range rows = share(w.rows, part);
  std::vector<float> weights(static_cast<size_t>(w.cols));
  for (int r = rows.begin; r < rows.end; ++r) {
    if (a.x.type != ActType::int8) quant::unpack_row(w.format, w.data + r * w.strip_bytes, w.cols, weights.data());
    for (int t = 0; t < a.x.rows; ++t) {
      float result;
      if (a.x.type == ActType::int8) {
        result = dot_int8(w, r, a.x, t);
      } else {
        const float* x = a.x.values + static_cast<int64_t>(t) * a.x.cols;
        double sum = 0.0;
        for (int k = 0; k < w.cols; ++k) sum += static_cast<double>(weights[static_cast<size_t>(k)]) * x[k];
        result = static_cast<float>(sum);
      }
      if (a.bias != nullptr) result += a.bias[r];
      float& out = a.out[t * a.out_stride + r];
      out = a.accumulate ? out + result : result;
    }
  }
}

void rotate(const float* x, const RopeTable& table, int position, float* out) {
  const int half = table.head_dim / 2;
  const float* cos = table.cos_sin + static_cast<int64_t>(position) * table.head_dim;
  const float* sin = cos + half;
  for (int i = 0; i < half; ++i) {
    const double a = x[i], b = x[i + half];
    out[i] = static_cast<float>(a * cos[i] - b * sin[i]);
    out[i + half] = static_cast<float>(b * cos[i] + a * sin[i]);
  }
}

void rope(const RopeArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    for (int h = 0; h < a.num_heads; ++h) {
      float* head = a.x + t * a.x_stride + h * a.table.head_dim;
      rotate(head, a.table, a.positions[t], head);
    }
  }
}

// Reference cells are [token][head_dim] for keys and values. Quantized, a token has its codes (of 4 bits: the even
// dimension low, the next one high) and then its scales, for groups each with the minimum behind it.
uint8_t* cell_element(const KvLayer& kv, int block, int which, int head, int token) {
  const int64_t cell_bytes = which == 0 ? kv.key_cell_bytes : kv.value_cell_bytes;
  return kv.base + block * kv.block_stride + int64_t{which} * kv.num_kv_heads * kv.key_cell_bytes + head * cell_bytes +
         token * (cell_bytes / kBlockTokens);
}

void store_u16(uint8_t* out, uint16_t value) { std::memcpy(out, &value, sizeof(value)); }

constexpr float kLargestHalf = 65504.0f;
constexpr uint16_t kHalfNan = 0x7e00;

uint16_t to_half(float value) { return f32_to_f16(std::clamp(value, -kLargestHalf, kLargestHalf)); }

bool all_finite(const float* values, int count) {
  return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

// See quant/kv_format.h.
void store_int8(const float* values, int dim, uint8_t* out) {
  float peak = 0.0f;
  for (int i = 0; i < dim; ++i) peak = std::max(peak, std::fabs(values[i]));
  const bool finite = all_finite(values, dim);
  const uint16_t scale = finite ? to_half(peak / 127.0f) : kHalfNan;
  const float step = finite ? f16_to_f32(scale) : 0.0f;
  for (int i = 0; i < dim; ++i) {
    const float code = step > 0.0f ? std::clamp(std::nearbyint(values[i] / step), -127.0f, 127.0f) : 0.0f;
    out[i] = static_cast<uint8_t>(static_cast<int8_t>(code));
  }
  store_u16(out + dim, scale);
}

void store_groups(const float* values, int dim, uint8_t* out) {
  uint8_t* scales = out + (dim + 1) / 2;
  std::memset(out, 0, static_cast<size_t>(scales - out));
  for (int begin = 0; begin < dim; begin += quant::kKvGroup, scales += 4) {
    const int count = std::min(quant::kKvGroup, dim - begin);
    const auto [low, high] = std::minmax_element(values + begin, values + begin + count);
    const bool finite = all_finite(values + begin, count);
    const uint16_t scale = finite ? to_half((*high - *low) / 15.0f) : uint16_t{0};
    const uint16_t minimum = finite ? to_half(*low + 0.0f) : kHalfNan;  // not -0
    store_u16(scales, scale);
    store_u16(scales + 2, minimum);
    const float step = f16_to_f32(scale), least = f16_to_f32(minimum);
    for (int i = begin; i < begin + count && step > 0.0f; ++i) {
      const float code = std::clamp(std::nearbyint((values[i] - least) / step), 0.0f, 15.0f);
      out[i / 2] = static_cast<uint8_t>(out[i / 2] | static_cast<int>(code) << i % 2 * 4);
    }
  }
}

// Of a token and head, both.
void store_halves(const float* key, const float* value, int dim, uint8_t* key_out, uint8_t* value_out) {
  const bool finite = all_finite(key, dim) && all_finite(value, dim);
  for (int i = 0; i < dim; ++i) {
    store_u16(key_out + 2 * i, finite ? to_half(key[i]) : kHalfNan);
    store_u16(value_out + 2 * i, finite ? to_half(value[i]) : uint16_t{0});
  }
}

bool has_groups(const KvLayer& kv, int which) {
  return (kv.format == quant::KvFormat::mixed || kv.format == quant::KvFormat::int4) && which == 1;
}

void store_kv(const KvLayer& kv, int which, const float* values, uint8_t* out) {
  if (kv.format == quant::KvFormat::f32) {
    std::memcpy(out, values, static_cast<size_t>(kv.head_dim) * 4);
  } else if (kv.format == quant::KvFormat::bf16) {
    for (int i = 0; i < kv.head_dim; ++i) store_u16(out + 2 * i, f32_to_bf16(values[i]));
  } else if (has_groups(kv, which)) {
    store_groups(values, kv.head_dim, out);
  } else {
    store_int8(values, kv.head_dim, out);
  }
}

float load_kv(const KvLayer& kv, int which, const uint8_t* row, int i) {
  if (kv.format == quant::KvFormat::bf16) return bf16_to_f32(load_u16(row + 2 * i));
  if (kv.format == quant::KvFormat::f16) return f16_to_f32(load_u16(row + 2 * i));
  if (has_groups(kv, which)) {
    const uint8_t* scales = row + (kv.head_dim + 1) / 2 + i / quant::kKvGroup * 4;
    const int code = row[i / 2] >> i % 2 * 4 & 15;
    return static_cast<float>(code) * f16_to_f32(load_u16(scales)) + f16_to_f32(load_u16(scales + 2));
  }
  if (kv.format != quant::KvFormat::f32) {
    return static_cast<float>(static_cast<int8_t>(row[i])) * f16_to_f32(load_u16(row + kv.head_dim));
  }
  float value;
  std::memcpy(&value, row + 4 * i, 4);
  return value;
}

// The key and the value of a token and head.
void store_token(const KvLayer& kv, const float* key, const float* value, uint8_t* key_out, uint8_t* value_out) {
  if (kv.format == quant::KvFormat::f16) return store_halves(key, value, kv.head_dim, key_out, value_out);
  store_kv(kv, 0, key, key_out);
  store_kv(kv, 1, value, value_out);
}

void kv_write(const KvWriteArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    const int block = a.slots[t] / kBlockTokens, token = a.slots[t] % kBlockTokens;
    for (int h = 0; h < a.kv.num_kv_heads; ++h) {
      const float* const key = a.k + t * a.k_stride + h * a.kv.head_dim;
      const float* const value = a.v + t * a.v_stride + h * a.kv.head_dim;
      uint8_t* const key_out = cell_element(a.kv, block, 0, h, token);
      uint8_t* const value_out = cell_element(a.kv, block, 1, h, token);
      if (quant::seals_keys(a.kv.format)) {
        float* const cell = reference::open_cell(a.kv, a.open, a.open.row_cells[t], h);
        for (int d = 0; d < a.kv.head_dim; ++d) cell[d * kBlockTokens + token] = key[d];
        store_kv(a.kv, 1, value, value_out);
      } else {
        store_token(a.kv, key, value, key_out, value_out);
      }
    }
  }
}

void kv_seal(const KvSealArgs& a, const Part& part) {
  const Range items = share(a.num_items * a.kv.num_kv_heads, part);
  for (int i = items.begin; i < items.end; ++i) {
    const SealItem& item = a.items[i / a.kv.num_kv_heads];
    const int head = i % a.kv.num_kv_heads;
    reference::seal_cell(reference::open_cell(a.kv, a.open, item.cell, head), a.kv.head_dim, item.num_tokens,
                         cell_element(a.kv, item.block, 0, head, 0));
  }
}

// Key i of a run as row t sees it, of a format that seals; `is_own`: the run has the row's own key.
void read_key(const AttentionArgs& a, int t, bool is_own, const AttentionRun& run, int i, int head, float* out) {
  const int dim = a.kv.head_dim, token = i % kBlockTokens;
  if (is_own && a.open.row_groups[t] == i / kBlockTokens) {
    const float* const cell = reference::open_cell(a.kv, a.open, a.open.row_cells[t], head);
    for (int d = 0; d < dim; ++d) out[d] = cell[d * kBlockTokens + token];
  } else {
    const uint8_t* const cell = cell_element(a.kv, a.blocks[run.block_begin + i / kBlockTokens], 0, head, 0);
    for (int d = 0; d < dim; ++d) out[d] = reference::sealed_key(cell, dim, token, d);
  }
  for (int d = 0; d < dim && a.open.bias != nullptr; ++d) out[d] += a.open.bias[head * dim + d];
  rotate(out, a.rope, run.positions_begin < 0 ? i : a.key_positions[run.positions_begin + i], out);
}

void key_deviation(const KeyDeviationArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  const bool seals = quant::seals_keys(a.a.format);
  for (int t = rows.begin; t < rows.end; ++t) {
    double sum = 0.0;
    for (int h = 0; h < a.a.num_kv_heads; ++h) {
      const uint8_t* x = cell_element(a.a, a.slots_a[t] / kBlockTokens, 0, h, a.slots_a[t] % kBlockTokens);
      const uint8_t* y = cell_element(a.b, a.slots_b[t] / kBlockTokens, 0, h, a.slots_b[t] % kBlockTokens);
      const float* const open =
          seals ? reference::open_cell(a.a, a.open, a.open.row_cells[t], h) + a.slots_a[t] % kBlockTokens : nullptr;
      const auto sealed = [&](int d) {
        const uint8_t* const cell = cell_element(a.b, a.slots_b[t] / kBlockTokens, 0, h, 0);
        return static_cast<double>(reference::sealed_key(cell, a.b.head_dim, a.slots_b[t] % kBlockTokens, d));
      };
      for (int d = 0; d < a.a.head_dim; ++d) {
        const double difference =
            seals ? static_cast<double>(open[d * kBlockTokens]) - sealed(d)
                  : static_cast<double>(load_kv(a.a, 0, x, d)) - static_cast<double>(load_kv(a.b, 0, y, d));
        sum += difference * difference;
      }
    }
    a.out[t] = static_cast<float>(sum);
  }
}

// The mean of a group's keys before rotation and of its values; the key rotated to the place of the summary.
void summarize_head(const SummarizeKvArgs& a, const KvSummary& summary, int head) {
  const int dim = a.kv.head_dim, half = dim / 2;
  std::vector<double> keys(static_cast<size_t>(dim), 0.0), values(static_cast<size_t>(dim), 0.0);
  for (int t = 0; t < summary.num_tokens; ++t) {
    const int at = summary.first_key + t, block = a.blocks[summary.block_begin + at / kBlockTokens];
    const uint8_t* key = cell_element(a.kv, block, 0, head, at % kBlockTokens);
    const uint8_t* value = cell_element(a.kv, block, 1, head, at % kBlockTokens);
    const float* angles = a.rope.cos_sin + static_cast<int64_t>(summary.position + t) * dim;
    for (int i = 0; i < half; ++i) {
      const double x = load_kv(a.kv, 0, key, i), y = load_kv(a.kv, 0, key, i + half);
      const double cos = angles[i], sin = angles[i + half], square = cos * cos + sin * sin;
      keys[static_cast<size_t>(i)] += (x * cos + y * sin) / square;
      keys[static_cast<size_t>(i + half)] += (y * cos - x * sin) / square;
    }
    for (int i = 0; i < dim; ++i) values[static_cast<size_t>(i)] += static_cast<double>(load_kv(a.kv, 1, value, i));
  }
  std::vector<float> mean_key, mean_value;
  for (const double sum : keys) mean_key.push_back(static_cast<float>(sum / summary.num_tokens));
  for (const double sum : values) mean_value.push_back(static_cast<float>(sum / summary.num_tokens));
  rotate(mean_key.data(), a.rope, summary.slot_position, mean_key.data());
  const int block = summary.slot / kBlockTokens, token = summary.slot % kBlockTokens;
  store_token(a.kv, mean_key.data(), mean_value.data(), cell_element(a.kv, block, 0, head, token),
              cell_element(a.kv, block, 1, head, token));
}

void summarize_kv(const SummarizeKvArgs& a, const Part& part) {
  const Range items = share(a.num_summaries * a.kv.num_kv_heads, part);
  for (int item = items.begin; item < items.end; ++item) {
    summarize_head(a, a.summaries[item / a.kv.num_kv_heads], item % a.kv.num_kv_heads);
  }
}

// One row and one head: softmax over all visible keys of all runs at once, in double.
void attend(const AttentionArgs& a, const AttentionSegment& segment, int t, int head) {
  const int dim = a.kv.head_dim;
  const int kv_head = head / (a.num_heads / a.kv.num_kv_heads);
  std::vector<double> scores;
  std::vector<const uint8_t*> values;
  std::vector<float> q(static_cast<size_t>(dim)), sealed(static_cast<size_t>(dim));
  const bool seals = quant::seals_keys(a.kv.format);
  for (int r = segment.run_begin; r < segment.run_begin + segment.run_count; ++r) {
    const AttentionRun& run = a.runs[r];
    const bool is_last = r == segment.run_begin + segment.run_count - 1;
    const KeyPolicy* policy = is_last && segment.policy >= 0 ? a.policies + segment.policy : nullptr;
    const int position = a.positions[t] - run.position_offset;  // of the row, counted from the run's first key
    if (position < 0) continue;
    rotate(a.q + t * a.q_stride + head * dim, a.rope, position, q.data());
    for (int i = run.first_key; i < run.num_keys; ++i) {
      const int key_position = run.positions_begin < 0 ? i : a.key_positions[run.positions_begin + i];
      if (key_position > position || (a.window > 0 && key_position <= position - a.window)) continue;
      if (run.hidden_begin >= 0 && (a.hidden[run.hidden_begin + i / kBlockTokens] >> i % kBlockTokens & 1) != 0)
        continue;
      if (policy != nullptr && (hidden_bits(*policy, position, i / kBlockTokens) >> i % kBlockTokens & 1) != 0)
        continue;
      const int block = a.blocks[run.block_begin + i / kBlockTokens];
      const uint8_t* key = cell_element(a.kv, block, 0, kv_head, i % kBlockTokens);
      double score = 0.0;
      if (seals) {
        const bool is_own = r + 1 == segment.run_begin + segment.run_count;
        read_key(a, t, is_own, run, i, kv_head, sealed.data());
      }
      for (int d = 0; d < dim; ++d) {
        const float k = seals ? sealed[static_cast<size_t>(d)] : load_kv(a.kv, 0, key, d);
        score += static_cast<double>(q[static_cast<size_t>(d)]) * static_cast<double>(k);
      }
      scores.push_back(score * static_cast<double>(a.scale) + static_cast<double>(run.score_bias));
      values.push_back(cell_element(a.kv, block, 1, kv_head, i % kBlockTokens));
    }
  }
  double largest = -std::numeric_limits<double>::infinity();
  for (double score : scores) largest = std::max(largest, score);
  double total = 0.0;
  std::vector<double> result(static_cast<size_t>(dim), 0.0);
  for (size_t i = 0; i < scores.size(); ++i) {
    const double p = std::exp(scores[i] - largest);
    total += p;
    for (int d = 0; d < dim; ++d) result[static_cast<size_t>(d)] += p * load_kv(a.kv, 1, values[i], d);
  }
  float* out = a.out + t * a.out_stride + head * dim;
  for (int d = 0; d < dim; ++d) {
    out[d] = total == 0.0 ? 0.0f : static_cast<float>(result[static_cast<size_t>(d)] / total);
  }
}

void attention(const AttentionArgs& a, const Part& part) {
  for (int s = 0; s < a.num_segments; ++s) {
    const AttentionSegment& segment = a.segments[s];
    const Range items = share(segment.row_count * a.num_heads, part);
    for (int item = items.begin; item < items.end; ++item) {
      attend(a, segment, segment.row_begin + item / a.num_heads, item % a.num_heads);
    }
  }
}

int64_t attention_scratch_bytes(const AttentionArgs&, int) { return 0; }

void silu_mul(const SiluMulArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    for (int i = 0; i < a.cols; ++i) {
      const double gate = a.gate[t * a.gate_stride + i];
      a.out[t * a.out_stride + i] =
          static_cast<float>(gate / (1.0 + std::exp(-gate)) * static_cast<double>(a.up[t * a.up_stride + i]));
    }
  }
}

void argmax(const ArgmaxArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    const float* x = a.x + t * a.x_stride;
    int best = 0;
    float best_value = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < a.cols; ++i) {
      if (x[i] > best_value) {
        best = i;
        best_value = x[i];
      }
    }
    a.out[t] = best;
  }
}

}  // namespace

const KernelTable& reference_kernels() {
  static const KernelTable table = {
      .name = "reference",
      .layout = WeightLayout::rows,
      .embed = embed,
      .rms_norm = rms_norm,
      .prepare = prepare,
      .linear = linear,
      .rope = rope,
      .kv_write = kv_write,
      .attention = attention,
      .attention_scratch_bytes = attention_scratch_bytes,
      .silu_mul = silu_mul,
      .argmax = argmax,
      .norm_qkv = nullptr,
      .linear_residual = nullptr,
      .norm_gate_up = nullptr,
      .head = nullptr,
      .key_deviation = key_deviation,
      .summarize_kv = summarize_kv,
      .kv_seal = kv_seal,
      .kv_formats = kAllKvFormats,
      .key_policies = true,
  };
  return table;
}

}  // namespace nb::ops
