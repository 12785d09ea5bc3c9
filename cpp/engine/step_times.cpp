#include "engine/step_times.h"

#include <algorithm>

namespace nb::engine {

namespace {

/// A moving average that forgets half in about six steps; the first value counts whole.
void blend(double& average, double value) { average = average > 0.0 ? 0.9 * average + 0.1 * value : value; }

}  // namespace

void StepTimes::record(int decode_rows, int prompt_rows, double seconds) {
  if (prompt_rows == 0) {
    if (decode_rows > 0) blend(decode_seconds_, seconds);
    return;
  }
  // Few rows say little about the cost of one: reading the weights is most of it.
  if (prompt_rows < kFewestRows) return;
  const double own = seconds - (decode_rows > 0 ? decode_seconds_ : 0.0);
  blend(prompt_seconds_, std::max(own, 0.1 * seconds) / prompt_rows);
}

int StepTimes::prompt_rows() const {
  if (decode_seconds_ <= 0.0 || prompt_seconds_ <= 0.0) return kFirstRows;
  const double rows = (kLongest - 1.0) * decode_seconds_ / prompt_seconds_;
  return static_cast<int>(std::clamp(rows, static_cast<double>(kFewestRows), 1e6));
}

}  // namespace nb::engine
