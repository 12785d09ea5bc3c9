// Says in the log how far the loading of a model has come, if it takes long.
//
// For one thread: the one that runs the packing. Not a progress bar: a line now and then.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "base/log.h"

namespace nb::model {

class LoadProgress {
 public:
  /// A line every `interval`, from the first such time on.
  explicit LoadProgress(std::string name, std::chrono::nanoseconds interval = std::chrono::seconds(3))
      : name_(std::move(name)), interval_(interval) {}

  /// `done` of `total` bytes are read.
  void operator()(std::int64_t done, std::int64_t total) {
    const Clock::time_point now = Clock::now();
    if (done >= total || now < next_) return;
    next_ = now + interval_;
    const double seconds = std::chrono::duration<double>(now - begun_).count();
    const auto megabytes = [](double bytes) { return static_cast<std::int64_t>(bytes / 1e6); };
    // Whoever prints lines for a person knows this one by how it begins (_logging.py).
    log(LogLevel::info, "loading ", name_, ": ", megabytes(static_cast<double>(done)), " of ",
        megabytes(static_cast<double>(total)), " MB, ", megabytes(static_cast<double>(done) / seconds), " MB/s");
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::string name_;
  std::chrono::nanoseconds interval_;
  Clock::time_point begun_ = Clock::now(), next_ = begun_ + interval_;
};

}  // namespace nb::model
