// How fast steps are: generated tokens per second, and bytes read from memory per second of forward pass.
//
// Times are given, never taken, so that the arithmetic can be tested. Time in which there was nothing to do does not
// count. Not for the speed of one request (metrics.h). Used by the thread that runs steps.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "engine/metrics.h"

namespace nb::engine {

/// What one step did.
struct StepWork {
  std::int64_t generated_tokens = 0;
  std::int64_t read_bytes = 0;   ///< weights, keys and values; see StepTraffic
  double forward_seconds = 0.0;  ///< decoder and head
};

/// Means over some steps.
struct Rates {
  double tokens_per_s = 0.0;   ///< generated tokens per second of work; 0 before any
  double read_gb_per_s = 0.0;  ///< 10^9 bytes per second of forward pass; 0 before any
};

class Throughput {
 public:
  static constexpr std::size_t kWindowSteps = 128;  ///< steps of recent()

  /// A step that took from `begun` to `ended`. If the one before left work (`has_more`), the time between the two
  /// counts as well: whoever drives the engine spent it.
  void record(const StepWork& work, Clock::time_point begun, Clock::time_point ended, bool has_more);

  Rates total() const { return rates(total_); }
  /// Over the last kWindowSteps steps, or all of them if there were fewer.
  Rates recent() const;
  std::int64_t read_bytes() const { return total_.work.read_bytes; }

 private:
  struct Entry {
    StepWork work;
    double seconds = 0.0;
  };
  static void add(Entry& sum, const Entry& entry);
  static Rates rates(const Entry& sum);

  Entry total_;
  std::array<Entry, kWindowSteps> window_{};  // a ring: step s is at s % kWindowSteps
  std::size_t next_ = 0;
  Clock::time_point busy_since_{};  // end of the step before, if it left work
  bool busy_ = false;
};

}  // namespace nb::engine
