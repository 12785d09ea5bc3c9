#include "text/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace nb::text {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include) : stops_(std::move(stops)), include_(include) {
  NB_CHECK(stops_.size() <= kMaxStops, invalid_argument, "there are ", stops_.size(), " stop strings, at most ",
           kMaxStops, " are allowed");
  for (const std::string& stop : stops_) {
    NB_CHECK(!stop.empty(), invalid_argument, "a stop string is empty");
    NB_CHECK(stop.size() <= kMaxStopBytes, invalid_argument, "a stop string has ", stop.size(), " bytes, at most ",
             kMaxStopBytes, " are allowed");
  }
  // The longest first, so that it counts if several are complete at the same place.
  std::stable_sort(stops_.begin(), stops_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

std::string StopMatcher::push(std::string_view piece) {
  if (matched_ != nullptr) return {};
  const std::size_t known = held_.size();
  held_ += piece;
  // The place where the first match is complete.
  std::size_t best_end = std::string::npos;
  for (const std::string& stop : stops_) {
    const std::size_t from = known >= stop.size() ? known - stop.size() + 1 : 0;
    const std::size_t found = held_.find(stop, from);
    if (found != std::string::npos && (best_end == std::string::npos || found + stop.size() < best_end)) {
      best_end = found + stop.size();
      matched_ = &stop;
    }
  }
  if (matched_ != nullptr) {
    held_.resize(include_ ? best_end : best_end - matched_->size());
    return std::exchange(held_, {});
  }
  const std::size_t certain = held_.size() - held_length();
  std::string out = held_.substr(0, certain);
  held_.erase(0, certain);
  return out;
}

std::string StopMatcher::pass(std::string_view piece) {
  if (matched_ != nullptr) return {};
  return std::exchange(held_, {}).append(piece);
}

std::string StopMatcher::finish() { return std::exchange(held_, {}); }

/// The longest end of what is held that a stop string begins with.
std::size_t StopMatcher::held_length() const {
  const std::string_view held = held_;
  for (std::size_t length = stops_.empty() ? 0 : std::min(held.size(), stops_[0].size() - 1); length > 0; --length) {
    const std::string_view end = held.substr(held.size() - length);
    const auto begins = [&](const std::string& stop) { return stop.size() > length && stop.starts_with(end); };
    if (std::any_of(stops_.begin(), stops_.end(), begins)) return length;
  }
  return 0;
}

}  // namespace nb::text
