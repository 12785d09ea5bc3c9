#include "text/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

#include "base/code_of.h"
#include "base/error.h"

namespace nb::text {
namespace {

/// What comes of a whole text, by looking at every end in turn.
struct Ended {
  std::string text;
  std::string stop;
};

Ended expected_of(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (std::size_t end = 1; end <= text.size(); ++end) {
    const std::string seen = text.substr(0, end);
    std::string longest;
    for (const std::string& stop : stops) {
      if (seen.ends_with(stop) && stop.size() > longest.size()) longest = stop;
    }
    if (!longest.empty()) return {include ? seen : seen.substr(0, end - longest.size()), longest};
  }
  return {text, ""};
}

TEST(StopMatcher, HoldsBackWhatCouldBecomeAStop) {
  StopMatcher matcher({"\n\n", "END"});
  EXPECT_EQ(matcher.push("one\n"), "one");
  EXPECT_EQ(matcher.push("two E"), "\ntwo ");
  EXPECT_EQ(matcher.push("N"), "");
  EXPECT_EQ(matcher.push("E"), "EN");
  EXPECT_EQ(matcher.push("ND more"), "");
  ASSERT_NE(matcher.matched(), nullptr);
  EXPECT_EQ(*matcher.matched(), "END");
  EXPECT_EQ(matcher.push("more"), "");
  EXPECT_EQ(matcher.finish(), "");
}

TEST(StopMatcher, GivesOutTheRestAtTheEnd) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.push("the EN"), "the ");
  EXPECT_EQ(matcher.finish(), "EN");
  EXPECT_EQ(matcher.matched(), nullptr);
}

TEST(StopMatcher, PassedTextStopsNothing) {
  StopMatcher matcher({"ab"});
  EXPECT_EQ(matcher.pass("ab a"), "ab a");
  EXPECT_EQ(matcher.push("b"), "b");  // its beginning was passed
  EXPECT_EQ(matcher.push("a"), "");
  EXPECT_EQ(matcher.pass("b"), "ab");
  EXPECT_EQ(matcher.matched(), nullptr);
}

TEST(StopMatcher, AgreesWithLookingAtEveryEnd) {
  std::mt19937 random(11);
  const auto word = [&](std::size_t most) {
    std::string out;
    for (std::size_t size = 1 + random() % most; out.size() < size;) out.push_back("ab"[random() % 2]);
    return out;
  };
  int matches = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::string> stops(random() % 4);
    for (std::string& stop : stops) stop = word(6);
    const bool include = random() % 2 == 0;
    const std::string text = word(30);
    StopMatcher matcher(stops, include);
    std::string out;
    std::size_t longest = 0;
    for (const std::string& stop : stops) longest = std::max(longest, stop.size());
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t size = 1 + random() % 5;
      out += matcher.push(text.substr(at, size));
      at += size;
      // Nothing is held back that cannot belong to a stop string.
      const std::size_t held = std::min(at, text.size()) - out.size();
      ASSERT_TRUE(matcher.matched() != nullptr || held < std::max<std::size_t>(longest, 1));
    }
    out += matcher.finish();
    const Ended expected = expected_of(text, stops, include);
    ASSERT_EQ(out, expected.text) << text;
    ASSERT_EQ(matcher.matched() != nullptr ? *matcher.matched() : "", expected.stop) << text;
    matches += matcher.matched() != nullptr;
  }
  EXPECT_GT(matches, 5'000);
}

TEST(StopMatcher, RefusesWhatCannotStop) {
  EXPECT_EQ(code_of([] { StopMatcher({""}); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([] { StopMatcher(std::vector<std::string>(17, "a")); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([] { StopMatcher({std::string(5000, 'a')}); }), ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace nb::text
