// stream_plan.cpp: what stays within a budget, and what is refused.
#include "model/stream_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "io/expect_error.h"

namespace nb::model {
namespace {

using io::test::expect_error;

const std::vector<std::int64_t> kEqual(10, 100);

StreamingOptions options_of(std::int64_t budget, int first = 0, int last = 0, int prefetch = 1) {
  return {.budget_bytes = budget, .keep_first_k = first, .keep_last_k = last, .prefetch_layers = prefetch};
}

TEST(StreamPlan, TheLeastIsSlotsAndWhatIsAlwaysThere) {
  const StreamPlan plan = plan_streaming(options_of(0), 50, kEqual);
  EXPECT_EQ(plan.streamed.size(), 10u);
  EXPECT_EQ(plan.num_slots, 2);
  EXPECT_EQ(plan.slot_bytes, 100);
  EXPECT_EQ(plan.total_bytes, 50 + 2 * 100);
  EXPECT_EQ(plan_streaming(options_of(0, 0, 0, 4), 50, kEqual).total_bytes, 50 + 5 * 100);
}

TEST(StreamPlan, KeepsWhatIsWished) {
  const StreamPlan plan = plan_streaming(options_of(0, 2, 3), 50, kEqual);
  EXPECT_EQ(plan.streamed, (std::vector<int>{2, 3, 4, 5, 6}));
  EXPECT_EQ(plan.total_bytes, 50 + 5 * 100 + 2 * 100);
  EXPECT_TRUE(plan_streaming(options_of(0, 6, 6), 50, kEqual).streamed.empty());
}

TEST(StreamPlan, KeepsWhatFitsBeyondTheWishEvenly) {
  EXPECT_EQ(plan_streaming(options_of(50 + 700), 50, kEqual).streamed, (std::vector<int>{1, 3, 5, 7, 9}));
  EXPECT_EQ(plan_streaming(options_of(50 + 899), 50, kEqual).streamed, (std::vector<int>{1, 3, 6, 8}));
  EXPECT_EQ(plan_streaming(options_of(50 + 799, 4, 0), 50, kEqual).streamed, (std::vector<int>{4, 5, 7, 8, 9}));
}

TEST(StreamPlan, EverythingStaysWhereEverythingFits) {
  const StreamPlan plan = plan_streaming(options_of(50 + 1000), 50, kEqual);
  EXPECT_TRUE(plan.streamed.empty());
  EXPECT_EQ(plan.num_slots, 0);
  EXPECT_EQ(plan.total_bytes, 50 + 1000);
}

TEST(StreamPlan, IsWithinEveryBudgetThatItAccepts) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::int64_t> sizes(1 + random() % 40);
    for (std::int64_t& size : sizes) size = 1 + random() % 1000;
    const int most = static_cast<int>(sizes.size());
    const StreamingOptions options = options_of(1 + random() % 30'000, static_cast<int>(random()) % (most / 2 + 1) & 7,
                                                static_cast<int>(random() % 3) % (most + 1), 1 + random() % 4);
    StreamPlan plan;
    try {
      plan = plan_streaming(options, 500, sizes);
    } catch (const Error&) {
      continue;
    }
    ASSERT_LE(plan.total_bytes, options.budget_bytes);
    std::int64_t total = 500 + plan.num_slots * plan.slot_bytes;
    for (int i = 0; i < most; ++i) {
      const bool streamed = std::binary_search(plan.streamed.begin(), plan.streamed.end(), i);
      ASSERT_TRUE(!streamed || (i >= options.keep_first_k && i < most - options.keep_last_k));
      ASSERT_TRUE(!streamed || sizes[static_cast<std::size_t>(i)] <= plan.slot_bytes);
      if (!streamed) total += sizes[static_cast<std::size_t>(i)];
    }
    ASSERT_EQ(total, plan.total_bytes);
    ASSERT_GE(plan.num_slots, std::min<int>(2, static_cast<int>(plan.streamed.size())));
  }
}

TEST(StreamPlan, NamesWhatIsWrong) {
  const auto refuses = [](const StreamingOptions& options, auto... parts) {
    expect_error(
        ErrorCode::invalid_argument, [&] { plan_streaming(options, 50, kEqual); }, parts...);
  };
  refuses(options_of(-1), "budget_bytes", "-1");
  refuses(options_of(0, -1), "keep_first_k", "[0, 10]", "-1");
  refuses(options_of(0, 0, 11), "keep_last_k", "[0, 10]", "11");
  refuses(options_of(0, 0, 0, 0), "prefetch_layers", "[1, 64]", "got 0");
  refuses(options_of(449, 1, 1), "budget_bytes is 449", "450 are needed", "50 for embeddings", "200 for 2 kept layers",
          "200 for 2 slots of 100");
  EXPECT_EQ(plan_streaming(options_of(450, 1, 1), 50, kEqual).total_bytes, 450);
}

}  // namespace
}  // namespace nb::model
