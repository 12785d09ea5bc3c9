// Which keys a row sees under a policy, token by token from the definition and nothing else.
//
// For tests only; shares no code with ops/key_policy.h beyond the fields.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/key_policy.h"

namespace nb::ops {

/// One row of a sequence; blocks have 16 tokens.
class NaiveRow {
 public:
  NaiveRow(const KeyPolicy& policy, int position) : policy_(policy), position_(position) {
    first_recent_ = std::max(0, position - policy.window + 1);
    if (policy.rule == KeyRule::budget) keep_best();
  }

  /// Whether the policy shows the row the key at s <= position.
  bool shows(int s) const {
    if (policy_.rule == KeyRule::full || s < policy_.prefix) return true;
    switch (policy_.rule) {
      case KeyRule::window:
        return s > position_ - policy_.window;
      case KeyRule::strided:
        return s / 16 >= first_recent_ / 16 || s / 16 % policy_.period == 0;
      case KeyRule::block:
        return s / 16 >= first_recent_ / 16 || s % policy_.period >= policy_.period - policy_.keep;
      case KeyRule::budget:
        return s / 16 >= first_recent_ / 16 || std::find(kept_.begin(), kept_.end(), s / 16) != kept_.end();
      default:  // the last token of the group is out of the window
        return (s / policy_.period + 1) * policy_.period - 1 > position_ - policy_.window;
    }
  }

 private:
  static int score(int block) {
    int times = 0;
    for (int number = block + 1; number % 2 == 0; number /= 2) ++times;
    return times;
  }

  void keep_best() {
    for (int block = 0; block < first_recent_ / 16; ++block) {
      if (16 * block >= policy_.prefix) kept_.push_back(block);
    }
    std::sort(kept_.begin(), kept_.end(),
              [](int a, int b) { return score(a) != score(b) ? score(a) > score(b) : a > b; });
    if (static_cast<int>(kept_.size()) > policy_.keep) kept_.resize(static_cast<std::size_t>(policy_.keep));
  }

  KeyPolicy policy_;
  int position_, first_recent_;
  std::vector<int> kept_;
};

}  // namespace nb::ops
