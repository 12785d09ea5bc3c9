#include "engine/draft_worth.h"

#include <gtest/gtest.h>

#include <vector>

namespace nb::engine {
namespace {

TEST(Acceptance, LearnsByEvidenceAndForgets) {
  Acceptance acceptance;
  EXPECT_LT(acceptance.estimate(1), acceptance.estimate(20));
  for (int i = 0; i < 100; ++i) {
    acceptance.record(1, false);
    acceptance.record(3, true);
  }
  EXPECT_LT(acceptance.estimate(1), 0.1);
  EXPECT_GT(acceptance.estimate(4), 0.9) << "of the same level as 3";
  EXPECT_EQ(acceptance.estimate(2), Acceptance().estimate(2)) << "of another";
  for (int i = 0; i < 100; ++i) acceptance.record(1, true);
  EXPECT_GT(acceptance.estimate(1), 0.8);
}

TEST(Acceptance, BeginsAsThePriorSays) {
  Acceptance prior, own;
  for (int i = 0; i < 100; ++i) prior.record(1, true);
  EXPECT_GT(own.estimate(1, &prior), 0.8);
  for (int i = 0; i < 40; ++i) own.record(1, false);
  EXPECT_LT(own.estimate(1, &prior), 0.3);
}

TEST(StepCosts, GrowEvenlyBetweenWhatWasSeen) {
  StepCosts costs;
  EXPECT_EQ(costs.seconds(3), 0.0);
  costs.record(5, 0.03);
  EXPECT_EQ(costs.seconds(3), 0.0) << "it is less, but how much?";
  EXPECT_NEAR(costs.seconds(9), 0.042, 1e-9) << "not seen: to be tried";
  costs.record(1, 0.01);
  EXPECT_DOUBLE_EQ(costs.seconds(3), 0.02);
  EXPECT_NEAR(costs.seconds(1005), 0.03 + 1000 * 0.005, 1e-9) << "beyond the table";
  costs.record(1000, 99.0);
  EXPECT_NEAR(costs.seconds(1005), 5.03, 1e-9) << "of such steps nothing is kept";
}

TEST(StepCosts, FollowWhatChangesMoreReadilyDownThanUp) {
  StepCosts costs;
  for (int i = 0; i < 20; ++i) costs.record(1, 0.01);
  costs.record(1, 1.0);
  EXPECT_LT(costs.seconds(1), 0.012);
  for (int i = 0; i < 20; ++i) costs.record(1, 0.002);
  EXPECT_LT(costs.seconds(1), 0.0021);
}

/// A step takes 10 ms and `each` more for each further row.
StepCosts costs_with(double each) {
  StepCosts costs;
  for (int rows = 1; rows <= 40; ++rows) costs.record(rows, 0.01 + each * (rows - 1));
  return costs;
}

std::vector<int> choose(const std::vector<std::vector<double>>& chances, int room, const StepCosts& costs) {
  std::vector<DraftChances> spans(chances.begin(), chances.end());
  std::vector<int> counts(chances.size());
  choose_counts(spans, static_cast<int>(chances.size()), room, costs, counts);
  return counts;
}

TEST(ChooseCounts, TakesWhatPaysAndNothingElse) {
  const std::vector<double> likely(8, 0.9), unlikely(8, 0.1);
  EXPECT_EQ(choose({likely}, 50, costs_with(0.0001)), (std::vector<int>{8}));
  EXPECT_EQ(choose({likely}, 3, costs_with(0.0001)), (std::vector<int>{3})) << "as many as there is room for";
  EXPECT_EQ(choose({unlikely}, 50, costs_with(0.002)), (std::vector<int>{0}));
  EXPECT_GT(choose({likely, unlikely, {}}, 50, costs_with(0.002))[0], 2);
  EXPECT_EQ(choose({likely, unlikely, {}}, 50, costs_with(0.002))[1], 0);
  EXPECT_EQ(choose({likely}, 50, costs_with(0.0101)), (std::vector<int>{0})) << "a row costs more than a token";
}

TEST(ChooseCounts, IsTheBestOfAllCounts) {
  const std::vector<double> chances{0.8, 0.9, 0.3, 0.7, 0.5};
  for (const double each : {0.0005, 0.001, 0.002, 0.004, 0.007}) {
    const StepCosts costs = costs_with(each);
    double best = 1.04 / costs.seconds(1), tokens = 1.0, reach = 1.0;
    int expected = 0;
    for (int count = 1; count <= 5; ++count) {
      reach *= chances[static_cast<std::size_t>(count) - 1];
      tokens += reach;
      if (tokens / costs.seconds(1 + count) <= best) continue;
      best = tokens / costs.seconds(1 + count);
      expected = count;
    }
    EXPECT_EQ(choose({chances}, 50, costs), (std::vector<int>{expected})) << each;
  }
}

TEST(ChooseCounts, LooksBeyondASmallStair) {
  StepCosts costs;  // rows cost nothing more up to 4, then up to 8
  for (int rows = 1; rows <= 8; ++rows) costs.record(rows, rows <= 4 ? 0.010 : 0.011);
  EXPECT_EQ(choose({std::vector<double>(7, 0.95)}, 50, costs), (std::vector<int>{7}));
}

TEST(ChooseCounts, LearnsFirstWhatAStepTakesWithoutDraftsAndThenTriesWhatIsLikely) {
  StepCosts costs;
  EXPECT_EQ(choose({{0.5, 0.5}, {0.1}}, 50, costs), (std::vector<int>{0, 0}));
  costs.record(2, 0.01);
  EXPECT_EQ(choose({{0.9, 0.9}, {0.1}}, 50, costs), (std::vector<int>{2, 0}));
}

}  // namespace
}  // namespace nb::engine
