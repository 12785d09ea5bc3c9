#include "engine/step_times.h"

#include <gtest/gtest.h>

namespace nb::engine {
namespace {

TEST(StepTimes, BeforeAnythingIsKnown) {
  StepTimes times;
  EXPECT_EQ(times.prompt_rows(), StepTimes::kFirstRows);
  times.record(4, 0, 0.004);
  EXPECT_EQ(times.prompt_rows(), StepTimes::kFirstRows);  // nothing about prompts yet
}

TEST(StepTimes, APromptRowFitsIntoWhatIsLeft) {
  StepTimes times;
  for (int i = 0; i < 100; ++i) {
    times.record(4, 0, 0.004);
    times.record(4, 100, 0.004 + 100 * 0.0001);
  }
  EXPECT_NEAR(times.prompt_rows(), (StepTimes::kLongest - 1.0) * 0.004 / 0.0001, 1);
  for (int i = 0; i < 100; ++i) times.record(0, 100, 100 * 0.0002);  // steps of prompts alone count too
  EXPECT_NEAR(times.prompt_rows(), (StepTimes::kLongest - 1.0) * 0.004 / 0.0002, 1);
}

TEST(StepTimes, AlwaysLeavesSomeRows) {
  StepTimes times;
  times.record(1, 0, 0.001);
  times.record(0, 100, 10.0);
  EXPECT_EQ(times.prompt_rows(), StepTimes::kFewestRows);
  times.record(1, 1, 100.0);  // too few rows to say anything
  EXPECT_EQ(times.prompt_rows(), StepTimes::kFewestRows);
}

}  // namespace
}  // namespace nb::engine
