#include "sampling/sample_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/align.h"
#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr std::size_t kAlignment = 8;
constexpr std::int32_t kWordBits = 32;
static_assert(sizeof(ops::SampleRow) % kAlignment == 0 && alignof(ops::SampleRow) <= kAlignment);

}  // namespace

void SampleRows::clear() {
  rows_.clear();
  offsets_.clear();
  lists_.clear();
}

template <class T>
std::size_t SampleRows::put(std::span<const T> values) {
  static_assert(alignof(T) <= kAlignment);
  const std::size_t begin = round_up(lists_.size(), kAlignment);
  lists_.resize(begin + values.size_bytes());
  if (!values.empty()) std::memcpy(lists_.data() + begin, values.data(), values.size_bytes());
  return begin;
}

void SampleRows::add_unwanted() {
  ops::SampleRow row{};
  row.log_min_p = -std::numeric_limits<double>::infinity();
  row.top_p = 1.0;
  row.repetition_penalty = 1.0;
  rows_.push_back(row);
  offsets_.push_back({});
}

void SampleRows::add(const SampleInput& input) {
  NB_ASSERT(input.num_prompt <= input.tokens.size());
  const SamplingParams& params = input.params;
  ops::SampleRow row{};
  Offsets offsets{};
  row.seed = input.seed;
  row.position = input.tokens.size();
  row.choice = params.choice_index;
  row.top_k = params.top_k;
  row.temperature = params.temperature;
  row.top_p = params.top_p;
  row.log_min_p = std::log(params.min_p);
  row.repetition_penalty = params.repetition_penalty;
  row.presence_penalty = params.presence_penalty;
  row.frequency_penalty = params.frequency_penalty;
  biases_.clear();
  for (const LogitBias& entry : params.logit_bias) biases_.push_back({entry.token, entry.bias});
  std::stable_sort(biases_.begin(), biases_.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  row.num_biases = static_cast<std::int32_t>(biases_.size());
  offsets.biases = put(std::span<const ops::TokenBias>(biases_));
  put_history(input, row, offsets);
  put_masked(input, row, offsets);
  put_allowed(input, row, offsets);
  rows_.push_back(row);
  offsets_.push_back(offsets);
}

/// Distinct tokens, if a penalty asks for them: of the whole text, or of the output alone.
void SampleRows::put_history(const SampleInput& input, ops::SampleRow& row, Offsets& offsets) {
  history_.clear();
  const bool by_text = row.repetition_penalty != 1.0;
  const bool by_output = row.presence_penalty != 0.0 || row.frequency_penalty != 0.0;
  if (by_text || by_output) {
    for (std::size_t i = by_text ? 0 : input.num_prompt; i < input.tokens.size(); ++i) {
      const auto token = static_cast<std::size_t>(input.tokens[i]);
      if (token >= places_.size()) places_.resize(token + 1, 0);
      if (places_[token] == 0) {
        history_.push_back({input.tokens[i], 0});
        places_[token] = static_cast<std::int32_t>(history_.size());
      }
      if (i >= input.num_prompt) ++history_[static_cast<std::size_t>(places_[token] - 1)].in_output;
    }
    for (const ops::TokenCount& entry : history_) places_[static_cast<std::size_t>(entry.token)] = 0;
  }
  row.num_history = static_cast<std::int32_t>(history_.size());
  offsets.history = put(std::span<const ops::TokenCount>(history_));
}

/// The last tokens of bad words whose other tokens are the end of the text, and what would end the output too early.
void SampleRows::put_masked(const SampleInput& input, ops::SampleRow& row, Offsets& offsets) {
  masked_.clear();
  for (const std::vector<TokenId>& word : input.params.bad_words_token_ids) {
    const auto before = std::span(word).first(word.size() - 1);
    if (before.size() > input.tokens.size()) continue;
    if (!std::equal(before.begin(), before.end(), input.tokens.last(before.size()).begin())) continue;
    masked_.push_back(word.back());
  }
  if (input.tokens.size() - input.num_prompt < static_cast<std::size_t>(input.params.min_tokens)) {
    masked_.insert(masked_.end(), input.stop_ids.begin(), input.stop_ids.end());
  }
  row.num_masked = static_cast<std::int32_t>(masked_.size());
  offsets.masked = put(std::span<const std::int32_t>(masked_));
}

/// A bit per token that both the request's own list and the given bits allow.
void SampleRows::put_allowed(const SampleInput& input, ops::SampleRow& row, Offsets& offsets) {
  allowed_.assign(input.allowed_bits.begin(), input.allowed_bits.end());
  if (input.params.allowed_token_ids) {
    const std::vector<TokenId>& tokens = *input.params.allowed_token_ids;
    const TokenId last = *std::max_element(tokens.begin(), tokens.end());  // the list is not empty
    std::vector<std::uint32_t> listed(static_cast<std::size_t>(last / kWordBits) + 1, 0);
    for (const TokenId token : tokens) {
      listed[static_cast<std::size_t>(token / kWordBits)] |= std::uint32_t{1} << token % kWordBits;
    }
    if (!allowed_.empty()) {
      listed.resize(std::min(listed.size(), allowed_.size()));
      for (std::size_t i = 0; i < listed.size(); ++i) listed[i] &= allowed_[i];
    }
    allowed_ = std::move(listed);
  }
  row.num_allowed_words = static_cast<std::int32_t>(allowed_.size());
  offsets.allowed = put(std::span<const std::uint32_t>(allowed_));
}

std::span<const std::byte> SampleRows::packed_for(const void* base) {
  const std::size_t begin = rows_.size() * sizeof(ops::SampleRow);
  const auto* lists = static_cast<const std::byte*>(base) + begin;
  packed_.resize(bytes());
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    ops::SampleRow row = rows_[i];
    const auto point = [&]<class T>(const T*& list, std::int32_t count, std::size_t offset) {
      list = count > 0 ? reinterpret_cast<const T*>(lists + offset) : nullptr;
    };
    point(row.biases, row.num_biases, offsets_[i].biases);
    point(row.history, row.num_history, offsets_[i].history);
    point(row.masked, row.num_masked, offsets_[i].masked);
    point(row.allowed_bits, row.num_allowed_words, offsets_[i].allowed);
    std::memcpy(packed_.data() + i * sizeof(row), &row, sizeof(row));
  }
  if (!lists_.empty()) std::memcpy(packed_.data() + begin, lists_.data(), lists_.size());
  return packed_;
}

}  // namespace nb::sampling
