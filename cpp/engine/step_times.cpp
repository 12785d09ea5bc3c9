#include "engine/step_times.h"

#include <algorithm>
#include <cmath>

namespace nb::engine {

namespace {

constexpr double kForget = 0.998;        // per step, of the moments
constexpr double kLeastKeySpread = 128;  // standard deviation of keys below which they tell nothing

/// A moving average of which a value is the given share; the first value counts whole. A value far above the average
/// is more often somebody else's use of the processor than a change, so that it counts as `most` times the average.
void blend(double& average, double value, double share, double most) {
  average = average > 0.0 ? (1.0 - share) * average + share * std::min(value, most * average) : value;
}

}  // namespace

void StepTimes::record(int decode_rows, int prompt_rows, double prompt_keys, double seconds) {
  if (decode_rows > 0) {
    decode_seconds_ = decode_seconds(decode_rows);
    decode_rows_ = decode_rows;
  }
  if (prompt_rows == 0) {
    // One of few says more than one of many.
    if (decode_rows > 0) blend(decode_seconds_, seconds, num_mixed_ > 0 ? 0.4 : 0.1, 2.0);
    num_mixed_ = 0;
    return;
  }
  num_mixed_ = decode_rows > 0 ? num_mixed_ + 1 : 0;
  // Reading the weights is most of a short step; beside decodes that is part of theirs.
  if (decode_rows == 0 && prompt_rows < kFewestRowsAlone) return;
  const double own = seconds - (decode_rows > 0 ? decode_seconds_ : 0.0);
  const double keys = prompt_keys / prompt_rows;
  last_keys_ = keys;
  double row = std::max(own, 0.1 * seconds) / prompt_rows;
  if (row_seconds_ > 0.0) row = std::min(row, 4.0 * row_seconds_ * (1.0 + key_share() * keys));
  moments_.weight = kForget * moments_.weight + 1.0;
  moments_.keys = kForget * moments_.keys + keys;
  moments_.seconds = kForget * moments_.seconds + row;
  moments_.keys_keys = kForget * moments_.keys_keys + keys * keys;
  moments_.keys_seconds = kForget * moments_.keys_seconds + keys * row;
  blend(row_seconds_, row / (1.0 + key_share() * keys), 0.1, 4.0);
}

/// What a step that only decodes takes with so many rows, if one of `decode_rows_` takes `decode_seconds_`.
double StepTimes::decode_seconds(int rows) const {
  if (decode_seconds_ == 0.0) return 0.0;
  const double guess = decode_seconds_ + (rows - decode_rows_) * row_seconds_;
  return std::clamp(guess, 0.5 * decode_seconds_, 4.0 * decode_seconds_);
}

/// Least squares of row seconds = a (1 + share * keys), the share kept within bounds: a bad guess of it would be a
/// wrong budget for the next prompt, which begins without context.
double StepTimes::key_share() const {
  if (moments_.weight == 0.0) return kFirstKeyShare;
  const double keys = moments_.keys / moments_.weight;
  const double variance = moments_.keys_keys / moments_.weight - keys * keys;
  if (variance < kLeastKeySpread * kLeastKeySpread) return kFirstKeyShare;
  const double seconds = moments_.seconds / moments_.weight;
  const double slope = (moments_.keys_seconds / moments_.weight - keys * seconds) / variance;
  const double first = seconds - slope * keys;
  return first > 0.0 ? std::clamp(slope / first, 0.0, kMostKeyShare) : kMostKeyShare;
}

/// What all streams lose together in a step is in proportion to those who wait.
double StepTimes::stretch(Demand demand) {
  if (demand.streaming == 0) return kLongestEver;
  if (demand.waiting <= 1) return kLongest;  // one alone delays nobody who waits behind it
  const double share = demand.waiting / (kFew * demand.streaming);
  return 1.0 + std::clamp((kLongest - 1.0) * share, kLongest - 1.0, kLongestEver - 1.0);
}

PromptBudget StepTimes::prompt_budget(Demand demand) const {
  constexpr double kRowWeight = 1e4;  // fine enough for the smallest share that matters
  const bool known = decode_seconds_ > 0.0 && row_seconds_ > 0.0;
  // Before anything is known about decodes, the first step with both is enough to ask.
  if (num_mixed_ >= (decode_seconds_ > 0.0 ? kProbeEvery : 1)) return {.work = 0};
  const double rows = known ? (stretch(demand) - 1.0) * decode_seconds_ / row_seconds_ : kFirstRows;
  const double half_a_row = known ? 0.5 * (1.0 + key_share() * last_keys_) : 0.0;
  return {.work = static_cast<std::int64_t>(std::min(rows + half_a_row, 1e6) * kRowWeight),
          .row_weight = static_cast<std::int64_t>(kRowWeight),
          .key_weight = std::llround(key_share() * kRowWeight)};
}

}  // namespace nb::engine
