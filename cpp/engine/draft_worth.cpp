#include "engine/draft_worth.h"

#include <algorithm>

#include "base/error.h"

namespace nb::engine {

namespace {

constexpr double kForget = 0.95;                                      // per guess of the same level
constexpr double kPriorWeight = 4.0;                                  // guesses
constexpr double kFirstChances[] = {0.15, 0.3, 0.45, 0.6, 0.7, 0.8};  // by level, before anything is known
constexpr double kUnseenRow = 0.1;   // of the step without it, of a row more than ever was seen
constexpr double kLeastGain = 1.04;  // times the tokens a second without drafts, for drafts to be tried

}  // namespace

std::size_t Acceptance::level_of(int evidence) {
  constexpr int kEnds[] = {1, 2, 4, 8, 16};
  return static_cast<std::size_t>(std::lower_bound(std::begin(kEnds), std::end(kEnds), evidence) - std::begin(kEnds));
}

double Acceptance::estimate(int evidence, const Acceptance* prior) const {
  const std::size_t level = level_of(evidence);
  const double first = prior != nullptr ? prior->estimate(evidence) : kFirstChances[level];
  return (right_[level] + kPriorWeight * first) / (tried_[level] + kPriorWeight);
}

void Acceptance::record(int evidence, bool right) {
  const std::size_t level = level_of(evidence);
  right_[level] = kForget * right_[level] + (right ? 1.0 : 0.0);
  tried_[level] = kForget * tried_[level] + 1.0;
}

void StepCosts::record(int rows, double seconds) {
  if (rows < 1 || rows > kMostRows) return;
  Average& average = by_rows_[static_cast<std::size_t>(rows)];
  ++average.num_seen;
  // What takes longer than before is more often somebody else's use of the processor than a change.
  const double share = seconds < average.seconds ? 0.3 : 0.1;
  const double value = average.num_seen > 2 ? std::min(seconds, 2.0 * average.seconds) : seconds;
  average.seconds += std::max(share, 1.0 / average.num_seen) * (value - average.seconds);
}

double StepCosts::seconds(int rows) const {
  NB_ASSERT(rows >= 1);
  int below = std::min(rows, kMostRows), above = below, first = 1;
  const auto is_seen = [&](int number) { return by_rows_[static_cast<std::size_t>(number)].num_seen > 0; };
  const auto value = [&](int number) { return by_rows_[static_cast<std::size_t>(number)].seconds; };
  while (below > 0 && !is_seen(below)) --below;
  while (above <= kMostRows && !is_seen(above)) ++above;
  if (below == 0) return 0.0;
  if (rows > kMostRows) {
    while (!is_seen(first)) ++first;
    const double each = below > first ? (value(below) - value(first)) / (below - first) : 0.0;
    return value(below) + std::max(0.0, each) * (rows - below);
  }
  if (above > kMostRows) return value(below) * (1.0 + kUnseenRow * (rows - below));
  if (above == below) return value(below);
  return value(below) + (value(above) - value(below)) * (rows - below) / (above - below);
}

void choose_counts(std::span<const DraftChances> chances, int rows, int room, const StepCosts& costs,
                   std::span<int> counts, const StepCosts* draft_costs) {
  NB_ASSERT(chances.size() == counts.size());
  std::fill(counts.begin(), counts.end(), 0);
  std::vector<double> reach(chances.size());  // that the next draft comes to be, and is right
  for (std::size_t i = 0; i < chances.size(); ++i) reach[i] = chances[i].empty() ? 0.0 : chances[i][0];
  std::vector<std::size_t> order;  // of sequences: each gives its next draft
  const double alone = costs.seconds(rows);
  double tokens = static_cast<double>(chances.size());
  if (alone == 0.0) return;
  double best = kLeastGain * tokens / alone;
  std::vector<int> rounds;  // how many sequences have so many drafts
  double making = 0.0;      // seconds of all rounds
  std::size_t num_best = 0;
  while (static_cast<int>(order.size()) < room) {
    const auto next = std::max_element(reach.begin(), reach.end());
    if (next == reach.end() || *next <= 0.0) break;
    const auto which = static_cast<std::size_t>(next - reach.begin());
    tokens += *next;
    order.push_back(which);
    const auto used = static_cast<std::size_t>(++counts[which]);
    *next = used < chances[which].size() ? *next * chances[which][used] : 0.0;
    if (draft_costs != nullptr) {
      if (rounds.size() < used) rounds.push_back(0);
      int& round = rounds[used - 1];
      making -= round == 0 ? 0.0 : draft_costs->seconds(round);
      making += draft_costs->seconds(++round);
    }
    const double seconds = costs.seconds(rows + static_cast<int>(order.size())) + making;
    if (tokens / seconds <= best) continue;
    best = tokens / seconds;
    num_best = order.size();
  }
  for (std::size_t i = num_best; i < order.size(); ++i) --counts[order[i]];
}

}  // namespace nb::engine
