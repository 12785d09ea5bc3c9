#include "sampling/sample_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace nb::sampling {
namespace {

constexpr std::uint32_t kVocab = 100;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// The rows where they can be read: packed for the memory in which they lie.
class Packed {
 public:
  explicit Packed(SampleRows& rows) : memory_(rows.bytes() / 8 + 1), count_(rows.size()) {
    const auto bytes = rows.packed_for(memory_.data());
    EXPECT_EQ(bytes.size(), rows.bytes());
    std::memcpy(memory_.data(), bytes.data(), bytes.size());
  }
  const ops::SampleRow& operator[](int i) const {
    EXPECT_LT(i, count_);
    return reinterpret_cast<const ops::SampleRow*>(memory_.data())[i];
  }

 private:
  std::vector<double> memory_;
  int count_;
};

/// A request at some point of its life.
struct State {
  SamplingParams params{};
  std::vector<TokenId> tokens = {1, 2, 2, 3, 2};
  std::size_t num_prompt = 3;
  std::vector<TokenId> stop_ids{};
  std::vector<std::uint32_t> allowed{};
  std::vector<float> logits{};

  SampleInput input() const { return {logits, params, 77, tokens, num_prompt, stop_ids, allowed}; }
};

std::vector<std::int32_t> masked(const ops::SampleRow& row) { return {row.masked, row.masked + row.num_masked}; }

std::vector<std::pair<int, int>> history(const ops::SampleRow& row) {
  std::vector<std::pair<int, int>> all;
  for (int i = 0; i < row.num_history; ++i) all.emplace_back(row.history[i].token, row.history[i].in_output);
  return all;
}

TEST(SampleRows, PlainRowsHaveNoLists) {
  State state;
  state.params.choice_index = 4;
  SampleRows rows;
  rows.add(state.input());
  rows.add_unwanted();
  const Packed packed(rows);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(packed[i].biases, nullptr);
    EXPECT_EQ(packed[i].history, nullptr);
    EXPECT_EQ(packed[i].masked, nullptr);
    EXPECT_EQ(packed[i].allowed_bits, nullptr);
    EXPECT_EQ(packed[i].log_min_p, -std::numeric_limits<double>::infinity());
    EXPECT_EQ(packed[i].top_p, 1.0);
    EXPECT_EQ(packed[i].repetition_penalty, 1.0);
  }
  EXPECT_EQ(packed[0].seed, 77U);
  EXPECT_EQ(packed[0].position, 5U);
  EXPECT_EQ(packed[0].choice, 4U);
  EXPECT_EQ(packed[0].temperature, 1.0);
  EXPECT_LE(packed[0].top_k, 0);
  EXPECT_EQ(packed[1].temperature, 0.0);
}

TEST(SampleRows, NumbersAreThoseOfTheRequest) {
  State state;
  state.params = {.temperature = 0.5,
                  .top_k = 7,
                  .top_p = 0.25,
                  .min_p = 0.125,
                  .repetition_penalty = 1.5,
                  .presence_penalty = -1.0,
                  .frequency_penalty = 2.0};
  SampleRows rows;
  rows.add(state.input());
  const Packed packed(rows);
  EXPECT_EQ(packed[0].temperature, 0.5);
  EXPECT_EQ(packed[0].top_k, 7);
  EXPECT_EQ(packed[0].top_p, 0.25);
  EXPECT_EQ(packed[0].log_min_p, std::log(0.125));
  EXPECT_EQ(packed[0].repetition_penalty, 1.5);
  EXPECT_EQ(packed[0].presence_penalty, -1.0);
  EXPECT_EQ(packed[0].frequency_penalty, 2.0);
}

TEST(SampleRows, HistoryCountsTheTokensThatAPenaltyAsksFor) {
  using Counts = std::vector<std::pair<int, int>>;
  State text, output;
  text.params.repetition_penalty = 1.1;
  output.params.frequency_penalty = 0.5;
  SampleRows rows;
  rows.add(text.input());
  rows.add(output.input());
  rows.add(text.input());
  const Packed packed(rows);
  EXPECT_EQ(history(packed[0]), (Counts{{1, 0}, {2, 1}, {3, 1}}));
  EXPECT_EQ(history(packed[1]), (Counts{{3, 1}, {2, 1}}));
  EXPECT_EQ(history(packed[2]), history(packed[0]));
}

TEST(SampleRows, BiasesAreSortedAndKeepTheirOrderForOneToken) {
  State state;
  state.params.logit_bias = {{9, 1.0}, {4, 2.0}, {9, -3.0}, {4, 0.5}};
  SampleRows rows;
  rows.add(state.input());
  const Packed packed(rows);
  ASSERT_EQ(packed[0].num_biases, 4);
  const TokenId tokens[] = {4, 4, 9, 9};
  const double biases[] = {2.0, 0.5, 1.0, -3.0};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(packed[0].biases[i].token, tokens[i]);
    EXPECT_EQ(packed[0].biases[i].bias, biases[i]);
  }
}

TEST(SampleRows, MasksBadWordsThatTheTextBeginsAndEarlyEnds) {
  State state;
  state.params.bad_words_token_ids = {{8}, {3, 2, 9}, {3, 3, 10}, {1, 2, 2, 3, 2, 11}, {5, 1, 2, 2, 3, 2, 12}};
  state.params.min_tokens = 3;
  state.stop_ids = {20, 21};
  SampleRows rows;
  rows.add(state.input());
  state.params.min_tokens = 2;  // so many are there
  rows.add(state.input());
  const Packed packed(rows);
  EXPECT_EQ(masked(packed[0]), (std::vector<std::int32_t>{8, 9, 11, 20, 21}));
  EXPECT_EQ(masked(packed[1]), (std::vector<std::int32_t>{8, 9, 11}));
}

TEST(SampleRows, AllowsWhatBothListsAllow) {
  State list, bits, both;
  list.params.allowed_token_ids = both.params.allowed_token_ids = {{3, 40, 70}};
  bits.allowed = both.allowed = {1U << 3, 1U << 9};
  SampleRows rows;
  for (const State* state : {&list, &bits, &both}) rows.add(state->input());
  const Packed packed(rows);
  const auto words = [&](int i) {
    return std::vector<std::uint32_t>(packed[i].allowed_bits, packed[i].allowed_bits + packed[i].num_allowed_words);
  };
  EXPECT_EQ(words(0), (std::vector<std::uint32_t>{1U << 3, 1U << 8, 1U << 6}));
  EXPECT_EQ(words(1), bits.allowed);
  EXPECT_EQ(words(2), (std::vector<std::uint32_t>{1U << 3, 0U}));
}

TEST(SampleRows, ClearForgetsRowsAndLists) {
  State state;
  state.params.logit_bias = {{9, 1.0}};
  SampleRows rows;
  rows.add(state.input());
  const std::size_t bytes = rows.bytes();
  rows.clear();
  EXPECT_EQ(rows.size(), 0);
  EXPECT_EQ(rows.bytes(), 0U);
  rows.add(state.input());
  EXPECT_EQ(rows.bytes(), bytes);
}

/// The most likely token after what a row says about logits, as ops/args.h reads.
TokenId best_of(const ops::SampleRow& row, std::vector<float> logits) {
  for (std::size_t t = 0; t < logits.size(); ++t) {
    const auto words = static_cast<std::size_t>(row.num_allowed_words);
    if (row.allowed_bits == nullptr) break;
    if (t / 32 >= words || (row.allowed_bits[t / 32] >> t % 32 & 1U) == 0) logits[t] = kMinusInfinity;
  }
  const auto at = [&](TokenId token) -> float& { return logits[static_cast<std::size_t>(token)]; };
  for (int i = 0; i < row.num_biases; ++i) {
    at(row.biases[i].token) = static_cast<float>(at(row.biases[i].token) + row.biases[i].bias);
  }
  for (int i = 0; i < row.num_masked; ++i) at(row.masked[i]) = kMinusInfinity;
  for (int i = 0; i < row.num_history; ++i) {
    const ops::TokenCount& entry = row.history[i];
    float& logit = at(entry.token);
    if (logit == kMinusInfinity) continue;
    const double penalty = row.repetition_penalty;
    logit = static_cast<float>(logit > 0.0F ? logit / penalty : logit * penalty);
    if (entry.in_output == 0) continue;
    logit = static_cast<float>(logit - entry.in_output * row.frequency_penalty - row.presence_penalty);
  }
  return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Rows of random requests lead to the sampler's tokens.
TEST(SampleRows, SayWhatTheSamplerDoes) {
  std::mt19937 random(3);
  const auto token = [&] { return static_cast<TokenId>(random() % kVocab); };
  std::vector<State> states;
  SampleRows rows;
  for (int i = 0; i < 400; ++i) {
    State state;
    std::normal_distribution<float> normal(0.0F, 1.0F);
    for (std::uint32_t t = 0; t < kVocab; ++t) state.logits.push_back(normal(random));
    state.tokens.clear();
    for (auto n = random() % 60 + 1; n > 0; --n) state.tokens.push_back(token() / 2);
    state.num_prompt = random() % state.tokens.size();
    state.params.temperature = 0.0;
    if (random() % 2 == 0) state.params.repetition_penalty = 1.7;
    if (random() % 2 == 0) state.params.presence_penalty = 0.7;
    if (random() % 2 == 0) state.params.frequency_penalty = -0.6;
    for (auto n = random() % 20; n > 0; --n) state.params.logit_bias.push_back({token(), normal(random) * 2.0});
    for (auto n = random() % 20; n > 0; --n) {
      state.params.bad_words_token_ids.push_back({token()});
      state.params.bad_words_token_ids.push_back({state.tokens.back(), token()});
    }
    if (random() % 3 == 0) {
      state.params.allowed_token_ids.emplace();
      for (int n = 0; n < 60; ++n) state.params.allowed_token_ids->push_back(token());
    }
    if (random() % 3 == 0) state.allowed = {static_cast<std::uint32_t>(random()), ~0U, ~0U};
    for (int n = 0; n < 20; ++n) state.stop_ids.push_back(token());
    state.params.min_tokens = static_cast<int>(random() % 60);
    rows.add(state.input());
    states.push_back(std::move(state));
  }
  const Packed packed(rows);
  Sampler sampler;
  int with_error = 0;
  for (int i = 0; i < 400; ++i) {
    const State& state = states[static_cast<std::size_t>(i)];
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(packed[i].biases) % alignof(ops::TokenBias), 0U);
    try {
      EXPECT_EQ(best_of(packed[i], state.logits), sampler.sample(state.input())) << "row " << i;
    } catch (const std::exception&) {
      ++with_error;  // nothing is left
    }
  }
  EXPECT_LT(with_error, 40);
}

}  // namespace
}  // namespace nb::sampling
