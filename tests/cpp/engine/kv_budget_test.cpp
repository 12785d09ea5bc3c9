#include "engine/kv_budget.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"

namespace nb::engine {
namespace {

constexpr std::int64_t kGigabyte = std::int64_t{1} << 30;

KvBudget budget() {
  return {.block_bytes = 1 << 20, .available_bytes = 64 * kGigabyte, .max_num_seqs = 4, .max_model_len = 1000};
}

TEST(KvBudget, DefaultHoldsEverySequence) { EXPECT_EQ(choose_num_blocks(budget()), 4 * 63); }

TEST(KvBudget, DefaultIsAtMostAQuarterOfWhatIsAvailable) {
  KvBudget tight = budget();
  tight.available_bytes = kGigabyte / 2;
  EXPECT_EQ(choose_num_blocks(tight), 128);
  tight.available_bytes = 0;  // unknown
  EXPECT_EQ(choose_num_blocks(tight), 4 * 63);
}

TEST(KvBudget, DefaultHoldsOneSequenceOrFailsWithTheNumbers) {
  KvBudget tight = budget();
  tight.available_bytes = 63 * 4 * (std::int64_t{1} << 20);
  EXPECT_EQ(choose_num_blocks(tight), 63);
  tight.available_bytes -= 4;
  try {
    choose_num_blocks(tight);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
    EXPECT_NE(std::string(error.what()).find(std::to_string(63 << 20)), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(std::to_string(tight.available_bytes)), std::string::npos);
  }
}

TEST(KvBudget, AnExplicitBudgetIsTakenAtItsWord) {
  KvBudget given = budget();
  given.kv_cache_bytes = 10 << 20;
  EXPECT_EQ(choose_num_blocks(given), 10);
  given.kv_cache_bytes += 1000;
  EXPECT_EQ(choose_num_blocks(given), 10);
  given.kv_cache_bytes = (1 << 20) - 1;
  try {
    choose_num_blocks(given);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
  }
}

TEST(KvBudget, SlotsFitInThirtyTwoBits) {
  KvBudget huge = budget();
  huge.block_bytes = 1;
  huge.kv_cache_bytes = std::int64_t{1} << 40;
  EXPECT_EQ(choose_num_blocks(huge), (1 << 27) - 1);
}

}  // namespace
}  // namespace nb::engine
