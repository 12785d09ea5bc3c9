#include "engine/kv_selftest.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/error.h"
#include "engine/engine.h"
#include "kv/block_table.h"
#include "quant/kv_format.h"

namespace nb::engine {

namespace {

/// Positions that both engines compute in a step, and of which logits are kept at a time.
constexpr int kSliceTokens = 64;

double log_sum_exp(std::span<const float> logits, float largest) {
  double sum = 0.0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - largest));
  return std::log(sum) + static_cast<double>(largest);
}

std::size_t argmax(std::span<const float> logits) {
  return static_cast<std::size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

/// KL(p || q) in nats of the distributions with these logits; infinite where one of them is none.
double divergence(std::span<const float> p, std::span<const float> q) {
  const float p_largest = p[argmax(p)], q_largest = q[argmax(q)];
  double sum = 0.0, weighted = 0.0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double weight = static_cast<double>(std::exp(p[i] - p_largest));
    sum += weight;
    weighted += weight * (static_cast<double>(p[i]) - static_cast<double>(q[i]));
  }
  const double p_total = std::log(sum) + static_cast<double>(p_largest);
  const double found = weighted / sum - p_total + log_sum_exp(q, q_largest);
  return std::isfinite(found) ? std::max(found, 0.0) : std::numeric_limits<double>::infinity();
}

/// The logits that the exact engine has computed last.
class ExactRows {
 public:
  explicit ExactRows(int vocab_size)
      : vocab_size_(static_cast<std::size_t>(vocab_size)),
        logits_(kSliceTokens * vocab_size_),
        positions_(kSliceTokens, -1) {}

  /// May be called by several threads at once, for different positions.
  void keep(int position, std::span<const float> logits) {
    std::copy(logits.begin(), logits.end(), row(position).begin());
    positions_[slot(position)] = position;
  }

  /// Nothing if they are not there.
  std::span<const float> at(int position) {
    return positions_[slot(position)] == position ? row(position) : std::span<float>();
  }

 private:
  static std::size_t slot(int position) { return static_cast<std::size_t>(position % kSliceTokens); }
  std::span<float> row(int position) { return std::span(logits_).subspan(slot(position) * vocab_size_, vocab_size_); }

  std::size_t vocab_size_;
  std::vector<float> logits_;   // [kSliceTokens, V]
  std::vector<int> positions_;  // whose logits a row has
};

/// How far another engine is from the exact one, position by position.
class Comparison {
 public:
  Comparison(ExactRows& exact, int first, int num_tokens)
      : exact_(exact), first_(first), kl_(static_cast<std::size_t>(num_tokens - first), -1.0), agrees_(kl_.size(), 0) {}

  /// May be called by several threads at once, for different positions.
  void add(int position, std::span<const float> logits) {
    const std::span<const float> exact = exact_.at(position);
    if (exact.empty()) return;  // mean() finds it missing
    const auto row = static_cast<std::size_t>(position - first_);
    agrees_[row] = argmax(exact) == argmax(logits) ? 1 : 0;
    kl_[row] = divergence(exact, logits);
  }

  double mean() const {
    double sum = 0.0;
    for (const double kl : kl_) {
      NB_ASSERT(kl >= 0.0);
      sum += kl;
    }
    return sum / static_cast<double>(kl_.size());
  }
  double worst() const { return *std::max_element(kl_.begin(), kl_.end()); }
  double agreement() const {
    return static_cast<double>(std::count(agrees_.begin(), agrees_.end(), 1)) / static_cast<double>(agrees_.size());
  }

 private:
  ExactRows& exact_;
  int first_;
  std::vector<double> kl_;  // of each position from `first_` on; -1: none came
  std::vector<std::uint8_t> agrees_;
};

/// What the text takes, and no more.
std::int64_t bytes_for(const model::Model& model, quant::KvFormat format, std::size_t num_tokens) {
  const model::ModelConfig& config = model.config();
  const kv::KvShape shape{format, config.num_layers, config.num_kv_heads, config.head_dim};
  return shape.block_bytes() * kv::BlockTable::blocks_for(static_cast<int>(num_tokens));
}

/// An engine with one request, which reads `tokens` and shows what it predicts.
class Reader {
 public:
  Reader(const model::Model& model, quant::KvFormat format, std::span<const TokenId> tokens, LogitsObserver observer)
      : engine_(model, {.kv_format = format,
                        .max_model_len = static_cast<int>(tokens.size()),
                        .max_num_seqs = 1,
                        .max_batch_tokens = kSliceTokens,
                        .kv_cache_bytes = bytes_for(model, format, tokens.size()),
                        .enable_prefix_caching = false}) {
    Request request;
    request.prompt.assign(tokens.begin(), tokens.end());
    request.max_tokens = 0;
    request.observer = std::move(observer);
    request.streams = false;
    engine_.submit(std::move(request));
  }

  /// Whether there is more to read.
  bool step() {
    if (!engine_.has_work()) return false;
    for (const StepOutput& output : engine_.step()) {
      const bool failed = output.finish_reason == FinishReason::error || output.finish_reason == FinishReason::abort;
      NB_CHECK(!failed, internal, "the self-test of a KV format failed: ", output.error);
    }
    return engine_.has_work();
  }

 private:
  Engine engine_;
};

}  // namespace

KvSelftest measure_kv_format(const model::Model& model, std::span<const TokenId> text, quant::KvFormat format) {
  const auto begun = std::chrono::steady_clock::now();
  const std::size_t num_tokens =
      std::min({text.size(), std::size_t{kSelftestTokens}, static_cast<std::size_t>(model.decoder().max_positions())});
  KvSelftest out{.format = format, .num_tokens = static_cast<int>(num_tokens)};
  if (out.num_tokens < kSelftestLeastTokens) return out;
  const int first = std::min(kSelftestFirst, out.num_tokens / 4);
  const auto tokens = text.first(num_tokens);
  ExactRows exact(model.config().vocab_size);
  Comparison rounded(exact, first, out.num_tokens), plain(exact, first, out.num_tokens);
  const auto comparing = [&](Comparison& with) {
    return LogitsObserver{first, [&with](int position, auto logits) { with.add(position, logits); }};
  };
  const auto keeping = [&](int position, auto logits) { exact.keep(position, logits); };
  std::vector<std::unique_ptr<Reader>> readers;  // the exact one first, so that its slice is there for the others
  readers.push_back(std::make_unique<Reader>(model, quant::KvFormat::f32, tokens, LogitsObserver{first, keeping}));
  readers.push_back(std::make_unique<Reader>(model, format, tokens, comparing(rounded)));
  const bool has_floor = model.act_type() == ops::ActType::int8;
  if (has_floor) {
    readers.push_back(std::make_unique<Reader>(model, quant::KvFormat::bf16, tokens, comparing(plain)));
  }
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (const auto& reader : readers) goes_on |= reader->step();
  }
  out.num_positions = out.num_tokens - first;
  out.mean_kl = rounded.mean();
  out.worst_kl = rounded.worst();
  out.agreement = rounded.agreement();
  if (has_floor) out.floor_kl = plain.mean();
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  return out;
}

bool is_within_limit(quant::KvFormat format, double cost) {
  const double most = quant::kv_format_info(format).most_kl;
  return most == 0.0 || cost <= most;
}

std::string kv_refusal(quant::KvFormat format, double cost, std::string_view model, std::string_view force) {
  const quant::KvFormatInfo& info = quant::kv_format_info(format);
  return concat("keys and values as '", info.name, "' change too much of what ", model,
                " predicts: over a text of our own by ", cost, " nats (mean KL to f32), the limit of the format is ",
                info.most_kl, "; use another kv_dtype, or ", force, " to have it all the same");
}

}  // namespace nb::engine
