// A dense decoder of any family as one obvious loop in double, and the same model written as a GGUF file.
//
// The oracle of loader and decoder: no KV cache, no blocks, no packing, rows in Hugging Face order. A file of the llama
// architecture stores Q and K rows with interleaved rotary pairs, as GGUF does. Shares no code with the engine. For
// tests only.
#pragma once

#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "io/gguf_builder.h"
#include "io/scratch_file.h"

namespace nb::model {

struct NaiveLlama {
  int layers = 2, hidden = 48, heads = 4, kv_heads = 2, dim = 16, inner = 80, vocab = 70, context = 600;
  std::string architecture = "llama";
  bool tied = true, bias = false, qk_norm = false;
  int window = 0;                                    // keys a token sees, its own included; 0 = all
  std::function<bool(int row, int key)> shows = {};  // which keys a row sees, if not all
  int period = 0, delay = 0;  // tokens of a group that is seen as its mean from `delay` rows behind its last one on
  double theta = 5000.0, eps = 1e-5;
  std::vector<double> frequencies;                             // instead of those of theta, one per pair
  double magnitude = 1.0;                                      // of cos and sin
  std::vector<float> divisors;                                 // written as rope_freqs.weight; forward ignores them
  std::function<void(io::test::GgufBuilder&)> more_keys = {};  // further metadata
  std::map<std::string, std::vector<float>> tensors;           // by GGUF name, rows in Hugging Face order
  std::map<std::string, std::vector<std::uint64_t>> dims;      // innermost first
  std::vector<std::string> order;
  std::function<void(const std::string&, const std::vector<double>&)> watch = {};  // each matrix's name and input

  void add(const std::string& name, int rows, int cols, double scale, double mean = 0.0) {
    std::vector<float> values(static_cast<std::size_t>(rows * cols));
    std::normal_distribution<float> normal(static_cast<float>(mean), static_cast<float>(scale));
    for (float& value : values) value = normal(random_);
    tensors[name] = values;
    dims[name] = rows == 1
                     ? std::vector<std::uint64_t>{static_cast<std::uint64_t>(cols)}
                     : std::vector<std::uint64_t>{static_cast<std::uint64_t>(cols), static_cast<std::uint64_t>(rows)};
    order.push_back(name);
  }

  void fill() {
    const double scale = 1.5 / std::sqrt(hidden);
    if (!divisors.empty()) {
      tensors["rope_freqs.weight"] = divisors;
      dims["rope_freqs.weight"] = {divisors.size()};
      order.emplace_back("rope_freqs.weight");
    }
    add("token_embd.weight", vocab, hidden, 1.0);
    add("output_norm.weight", 1, hidden, 0.1, 1.0);
    if (!tied) add("output.weight", vocab, hidden, scale);
    for (int i = 0; i < layers; ++i) {
      const std::string prefix = "blk." + std::to_string(i) + ".";
      add(prefix + "attn_norm.weight", 1, hidden, 0.1, 1.0);
      add(prefix + "attn_q.weight", heads * dim, hidden, scale);
      add(prefix + "attn_k.weight", kv_heads * dim, hidden, scale);
      add(prefix + "attn_v.weight", kv_heads * dim, hidden, scale);
      if (bias) {
        add(prefix + "attn_q.bias", 1, heads * dim, 0.7);
        add(prefix + "attn_k.bias", 1, kv_heads * dim, 0.7);
        add(prefix + "attn_v.bias", 1, kv_heads * dim, 0.7);
      }
      if (qk_norm) {
        add(prefix + "attn_q_norm.weight", 1, dim, 0.5, 1.0);
        add(prefix + "attn_k_norm.weight", 1, dim, 0.5, 1.0);
      }
      add(prefix + "attn_output.weight", hidden, heads * dim, scale);
      add(prefix + "ffn_norm.weight", 1, hidden, 0.1, 1.0);
      add(prefix + "ffn_gate.weight", inner, hidden, scale);
      add(prefix + "ffn_up.weight", inner, hidden, scale);
      add(prefix + "ffn_down.weight", hidden, inner, scale);
    }
  }

  using Vector = std::vector<double>;

  Vector multiply(const std::string& name, const Vector& x, int rows) const {
    if (watch) watch(name, x);
    const std::vector<float>& w = tensors.at(name);
    Vector out(static_cast<std::size_t>(rows), 0.0);
    for (std::size_t r = 0; r < out.size(); ++r) {
      for (std::size_t c = 0; c < x.size(); ++c) out[r] += static_cast<double>(w[r * x.size() + c]) * x[c];
    }
    return out;
  }

  Vector normalise(const std::string& name, const Vector& x) const {
    double sum = 0.0;
    for (double value : x) sum += value * value;
    Vector out = x;
    for (std::size_t i = 0; i < x.size(); ++i) {
      out[i] *= static_cast<double>(tensors.at(name)[i]) / std::sqrt(sum / static_cast<double>(x.size()) + eps);
    }
    return out;
  }

  // A projection with its bias, each head normalised if the model does that.
  Vector project(const std::string& prefix, const char* which, const Vector& x, int rows) const {
    Vector out = multiply(prefix + "attn_" + which + ".weight", x, rows);
    if (bias) {
      for (std::size_t r = 0; r < out.size(); ++r) {
        out[r] += static_cast<double>(tensors.at(prefix + "attn_" + which + ".bias")[r]);
      }
    }
    if (!qk_norm || *which == 'v') return out;
    for (int head = 0; head < rows / dim; ++head) {
      const auto at = out.begin() + head * dim;
      const Vector normed = normalise(prefix + "attn_" + which + "_norm.weight", Vector(at, at + dim));
      std::copy(normed.begin(), normed.end(), at);
    }
    return out;
  }

  void rotate(Vector& x, int position) const {
    const auto half = static_cast<std::size_t>(dim / 2), width = static_cast<std::size_t>(dim);
    for (std::size_t head = 0; head < x.size(); head += width) {
      for (std::size_t i = 0; i < half; ++i) {
        const double angle =
            position * (frequencies.empty() ? std::pow(theta, -2.0 * static_cast<double>(i) / dim) : frequencies[i]);
        const double a = x[head + i] * magnitude, b = x[head + half + i] * magnitude;
        x[head + i] = a * std::cos(angle) - b * std::sin(angle);
        x[head + half + i] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }

  /// Logits of every position, [T][vocab].
  std::vector<Vector> forward(const std::vector<int>& ids) const {
    std::vector<Vector> x;
    for (int id : ids) {
      const float* row = tensors.at("token_embd.weight").data() + id * hidden;
      x.emplace_back(row, row + hidden);
    }
    for (int i = 0; i < layers; ++i) {
      const std::string prefix = "blk." + std::to_string(i) + ".";
      std::vector<Vector> keys, values, plain_keys;
      for (std::size_t t = 0; t < x.size(); ++t) {
        const Vector normed = normalise(prefix + "attn_norm.weight", x[t]);
        Vector q = project(prefix, "q", normed, heads * dim);
        keys.push_back(project(prefix, "k", normed, kv_heads * dim));
        values.push_back(project(prefix, "v", normed, kv_heads * dim));
        plain_keys.push_back(keys.back());
        rotate(q, static_cast<int>(t));
        rotate(keys.back(), static_cast<int>(t));
        std::vector<Seen> seen = seen_keys(keys, values);
        if (period > 0) add_means(static_cast<int>(t), plain_keys, values, seen);
        add_to(x[t], multiply(prefix + "attn_output.weight", attend(q, seen), hidden));
      }
      for (Vector& row : x) {
        const Vector normed = normalise(prefix + "ffn_norm.weight", row);
        Vector gate = multiply(prefix + "ffn_gate.weight", normed, inner);
        const Vector up = multiply(prefix + "ffn_up.weight", normed, inner);
        for (std::size_t j = 0; j < gate.size(); ++j) gate[j] = gate[j] / (1.0 + std::exp(-gate[j])) * up[j];
        add_to(row, multiply(prefix + "ffn_down.weight", gate, hidden));
      }
    }
    std::vector<Vector> logits;
    for (const Vector& row : x) {
      logits.push_back(
          multiply(tied ? "token_embd.weight" : "output.weight", normalise("output_norm.weight", row), vocab));
    }
    return logits;
  }

  /// The model as a GGUF file in f32.
  io::test::Bytes gguf() const {
    using namespace io::test;
    GgufBuilder builder;
    describe(builder);
    for (const std::string& name : order) {
      builder.tensor({.name = name, .dims = dims.at(name), .type = 0, .data_bytes = tensors.at(name).size() * 4});
    }
    Bytes out = builder.header();
    for (const std::string& name : order) {
      out.resize((out.size() + 31) / 32 * 32);
      for (float value : stored(name)) append(out, value);
    }
    return out;
  }

  /// The metadata; a test may add to it or leave keys out by writing its own.
  void describe(io::test::GgufBuilder& builder) const {
    using namespace io::test;
    const auto number = [&](const std::string& key, int value) {
      builder.number<std::uint32_t>(architecture + "." + key, kU32, static_cast<std::uint32_t>(value));
    };
    builder.string("general.architecture", architecture);
    number("block_count", layers);
    number("embedding_length", hidden);
    number("attention.head_count", heads);
    number("attention.head_count_kv", kv_heads);
    number("attention.key_length", dim);
    number("feed_forward_length", inner);
    number("context_length", context);
    builder.number<float>(architecture + ".attention.layer_norm_rms_epsilon", kF32, static_cast<float>(eps));
    builder.number<float>(architecture + ".rope.freq_base", kF32, static_cast<float>(theta));
    if (window > 0) number("attention.sliding_window", window);
    if (more_keys) more_keys(builder);
  }

 private:
  static void add_to(Vector& x, const Vector& y) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  // A key and value that a row sees, as many times over.
  struct Seen {
    Vector key, value;
    double times;
  };

  // Those of the last row.
  std::vector<Seen> seen_keys(const std::vector<Vector>& keys, const std::vector<Vector>& values) const {
    const std::size_t count = static_cast<std::size_t>(window);
    std::vector<Seen> seen;
    for (std::size_t t = count > 0 && keys.size() > count ? keys.size() - count : 0; t < keys.size(); ++t) {
      const int row = static_cast<int>(keys.size()) - 1;
      if (!shows || shows(row, static_cast<int>(t))) seen.push_back({keys[t], values[t], 1.0});
    }
    return seen;
  }

  // Each group but the first one whose turn has come is seen as its mean, in its middle, as many times as it has
  // tokens.
  void add_means(int row, const std::vector<Vector>& keys, const std::vector<Vector>& values,
                 std::vector<Seen>& seen) const {
    for (int begin = period; begin + period - 1 + delay <= row; begin += period) {
      Vector key(keys[0].size(), 0.0), value = key;
      for (int t = begin; t < begin + period; ++t) {
        for (std::size_t d = 0; d < key.size(); ++d) {
          key[d] += keys[static_cast<std::size_t>(t)][d] / period;
          value[d] += values[static_cast<std::size_t>(t)][d] / period;
        }
      }
      rotate(key, begin + period / 2);
      seen.push_back({key, value, static_cast<double>(period)});
    }
  }

  Vector attend(const Vector& q, const std::vector<Seen>& seen) const {
    Vector out(q.size(), 0.0);
    for (int h = 0; h < heads; ++h) {
      const auto at = static_cast<std::size_t>(h * dim), kv_at = static_cast<std::size_t>(h / (heads / kv_heads) * dim);
      Vector weights;
      double total = 0.0;
      for (const Seen& one : seen) {
        double score = 0.0;
        for (std::size_t d = 0; d < static_cast<std::size_t>(dim); ++d) score += q[at + d] * one.key[kv_at + d];
        weights.push_back(std::exp(score / std::sqrt(dim)) * one.times);
        total += weights.back();
      }
      for (std::size_t i = 0; i < seen.size(); ++i) {
        for (std::size_t d = 0; d < static_cast<std::size_t>(dim); ++d) {
          out[at + d] += weights[i] / total * seen[i].value[kv_at + d];
        }
      }
    }
    return out;
  }

  // Q and K rows (and biases) of each head as GGUF orders them: the two halves of the head interleaved.
  std::vector<float> stored(const std::string& name) const {
    std::vector<float> values = tensors.at(name);
    if (architecture != "llama") return values;
    if (name.find("attn_q.") == std::string::npos && name.find("attn_k.") == std::string::npos) return values;
    const std::vector<float> source = values;
    const int width = name.ends_with(".bias") ? 1 : hidden;
    const int rows = static_cast<int>(source.size()) / width, half = dim / 2;
    for (int row = 0; row < rows; ++row) {
      const int head = row / dim, within = row % dim;
      const int target = head * dim + within % half * 2 + within / half;
      std::copy_n(source.begin() + row * width, width, values.begin() + target * width);
    }
    return values;
  }

  std::mt19937 random_{17};
};

/// With the sizes above and random weights.
inline NaiveLlama tiny_llama() {
  NaiveLlama naive;
  naive.fill();
  return naive;
}

}  // namespace nb::model
