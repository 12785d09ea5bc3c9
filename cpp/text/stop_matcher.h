// Stop strings in a text that arrives in pieces: what may be shown, and when it is over.
//
// Text that could be the beginning of a stop string is held back until it is known not to be one. Knows bytes only, so
// a stop string may lie across tokens in any way. Not for tokens that stop (engine). Used by one thread at a time.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace nb::text {

class StopMatcher {
 public:
  static constexpr std::size_t kMaxStops = 16;
  static constexpr std::size_t kMaxStopBytes = 4096;

  /// The text ends where the first stop string is complete: before it, or behind it with `include`. If several are
  /// complete at the same place, the longest counts. Throws invalid_argument for more than kMaxStops, an empty one or
  /// one of more than kMaxStopBytes.
  explicit StopMatcher(std::vector<std::string> stops, bool include = false);

  /// Takes in the next piece and returns what is certain to be part of the text. After a match everything is dropped.
  std::string push(std::string_view piece);

  /// Takes in a piece in which no stop string may be complete, nor begin; what was held back comes first.
  std::string pass(std::string_view piece);

  /// What was held back: there will be no more text. The matcher is as new, unless it has matched.
  std::string finish();

  /// The stop string that ended the text, or nullptr.
  const std::string* matched() const { return matched_; }

 private:
  std::size_t held_length() const;

  std::vector<std::string> stops_;
  bool include_;
  std::string held_;
  const std::string* matched_ = nullptr;
};

}  // namespace nb::text
