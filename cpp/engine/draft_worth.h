// What drafts are worth: how often guesses have been right, what a step of so many rows takes, and how many drafts that
// makes the most tokens a second.
//
// Given times and outcomes, never takes any. No token depends on it. Used by the thread that runs steps.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <vector>

namespace nb::engine {

/// How often guesses were right, by how much speaks for them. Old ones are forgotten.
class Acceptance {
 public:
  /// The probability that a guess with this evidence (tokens before it that were seen before) is right. `prior`, if
  /// any, counts like a few guesses.
  double estimate(int evidence, const Acceptance* prior = nullptr) const;
  void record(int evidence, bool right);

 private:
  static constexpr std::size_t kLevels = 6;
  static std::size_t level_of(int evidence);

  std::array<double, kLevels> right_{};
  std::array<double, kLevels> tried_{};
};

/// What a step takes that only decodes, by its rows.
class StepCosts {
 public:
  static constexpr int kMostRows = 128;  ///< beyond, a row more takes what it takes on average below

  void record(int rows, double seconds);

  /// 0 where nothing is known of so few rows. Between numbers of rows that were seen it grows evenly; beyond them
  /// each row is taken to cost a tenth more, which is little, so that it will be tried.
  double seconds(int rows) const;

 private:
  struct Average {
    double seconds = 0.0;
    int num_seen = 0;
  };
  std::array<Average, kMostRows + 1> by_rows_{};
};

/// A sequence's drafts in order: how likely each is right if those before it are.
using DraftChances = std::span<const double>;

/// Sets counts[i], how many drafts sequence i gets, to what makes the most tokens a second of a step that has `rows`
/// rows without them and room for `room` more, each sequence yielding a token of its own. None before it is known what
/// a step without drafts takes. `draft_costs`, if any: what making the first draft of so many sequences takes, as much
/// as the second, and so on.
void choose_counts(std::span<const DraftChances> chances, int rows, int room, const StepCosts& costs,
                   std::span<int> counts, const StepCosts* draft_costs = nullptr);

}  // namespace nb::engine
