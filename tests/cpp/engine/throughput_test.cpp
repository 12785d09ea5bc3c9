#include "engine/throughput.h"

#include <gtest/gtest.h>

namespace nb::engine {
namespace {

Clock::time_point at(double seconds) {
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
}

TEST(Throughput, IsZeroBeforeAnything) {
  Throughput throughput;
  EXPECT_EQ(throughput.total().tokens_per_s, 0.0);
  EXPECT_EQ(throughput.recent().read_gb_per_s, 0.0);
  EXPECT_EQ(throughput.read_bytes(), 0);
  throughput.record({}, at(1.0), at(1.0), false);  // a step without work and without time
  EXPECT_EQ(throughput.total().tokens_per_s, 0.0);
}

TEST(Throughput, DividesTokensByTheTimeOfStepsAndBytesByThatOfTheForwardPass) {
  Throughput throughput;
  throughput.record({.generated_tokens = 3, .read_bytes = 4'000'000'000, .forward_seconds = 0.25}, at(10.0), at(10.5),
                    true);
  EXPECT_DOUBLE_EQ(throughput.total().tokens_per_s, 6.0);
  EXPECT_DOUBLE_EQ(throughput.total().read_gb_per_s, 16.0);
  // Half a second between the steps, while there was work, and half a second in the second one.
  throughput.record({.generated_tokens = 6, .read_bytes = 1'000'000'000, .forward_seconds = 0.25}, at(11.0), at(11.5),
                    false);
  EXPECT_DOUBLE_EQ(throughput.total().tokens_per_s, 9.0 / 1.5);
  EXPECT_DOUBLE_EQ(throughput.total().read_gb_per_s, 10.0);
  EXPECT_DOUBLE_EQ(throughput.recent().tokens_per_s, 9.0 / 1.5);
  EXPECT_EQ(throughput.read_bytes(), 5'000'000'000);
}

TEST(Throughput, IdleTimeDoesNotCount) {
  Throughput throughput;
  throughput.record({.generated_tokens = 1}, at(0.0), at(1.0), false);
  throughput.record({.generated_tokens = 1}, at(100.0), at(101.0), false);
  EXPECT_DOUBLE_EQ(throughput.total().tokens_per_s, 1.0);
}

TEST(Throughput, RecentForgetsWhatIsOlderThanTheWindow) {
  Throughput throughput;
  const auto step = [&](int index, std::int64_t tokens) {
    throughput.record({.generated_tokens = tokens, .read_bytes = 1'000'000'000 * tokens, .forward_seconds = 1.0},
                      at(index), at(index + 1), true);
  };
  const int window = static_cast<int>(Throughput::kWindowSteps);
  for (int i = 0; i < 2 * window; ++i) step(i, 10);
  EXPECT_DOUBLE_EQ(throughput.recent().tokens_per_s, 10.0);
  for (int i = 2 * window; i < 3 * window - 1; ++i) step(i, 2);
  EXPECT_DOUBLE_EQ(throughput.recent().tokens_per_s, (10.0 + 2.0 * (window - 1)) / window);
  step(3 * window - 1, 2);
  EXPECT_DOUBLE_EQ(throughput.recent().tokens_per_s, 2.0);
  EXPECT_DOUBLE_EQ(throughput.recent().read_gb_per_s, 2.0);
  EXPECT_DOUBLE_EQ(throughput.total().tokens_per_s, 22.0 / 3.0);
}

TEST(RequestMetrics, SpeedIsThatOfTheTokensAfterTheFirst) {
  RequestTimes times;
  times.submitted = at(1.0);
  EXPECT_EQ(metrics_at(times, 0, at(3.0)).tokens_per_s, 0.0);
  times.first_planned = at(1.5);
  times.first_token = times.last_token = at(2.0);
  EXPECT_EQ(metrics_at(times, 1, at(3.0)).tokens_per_s, 0.0);
  times.last_token = at(4.0);
  const RequestMetrics metrics = metrics_at(times, 9, at(5.0));  // it ended a second after its newest token
  EXPECT_DOUBLE_EQ(metrics.queue_ms, 500.0);
  EXPECT_DOUBLE_EQ(metrics.ttft_ms, 1000.0);
  EXPECT_DOUBLE_EQ(metrics.total_ms, 4000.0);
  EXPECT_DOUBLE_EQ(metrics.tokens_per_s, 4.0);
  times.last_token = times.first_token;  // several tokens in one step
  EXPECT_EQ(metrics_at(times, 3, at(5.0)).tokens_per_s, 0.0);
}

}  // namespace
}  // namespace nb::engine
