// Summaries of groups of tokens on every backend, against means in double of what the formats say is kept.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "base/code_of.h"
#include "base/error.h"
#include "ops/summary_fixture.h"

namespace nb::ops {
namespace {

class Summaries : public EveryBackend {};

TEST_P(Summaries, AreMeansOfWhatIsStored) {
  Bench bench(GetParam(), 3);
  for (const KvFormat format : kv_formats()) expect_means_of_what_is_stored(bench, format);
}

// All bits, for any number of threads, and nothing else is touched.
TEST_P(Summaries, ThreadsChangeNoBitAndOnlyTheSlotIsWritten) {
  Bench one(GetParam(), 1), three(GetParam(), 3);
  for (const KvFormat format : kv_formats()) {
    Stored a(one, format, 48, 1.0f), b(three, format, 48, 1.0f);
    const auto bytes = [](const Stored& stored) {
      const std::uint8_t* base = stored.storage.layer(0).base;
      return std::vector<std::uint8_t>(base, base + stored.storage.bytes());
    };
    const auto before = bytes(a);
    summarize_kv(a.layer(), kSummaries, a.blocks, a.rotations(), one.ctx);
    summarize_kv(b.layer(), kSummaries, b.blocks, b.rotations(), three.ctx);
    const auto after = bytes(a);
    EXPECT_EQ(bytes(b), after) << quant::to_string(format);
    EXPECT_NE(after, before);
    const auto block_bytes = static_cast<std::ptrdiff_t>(a.storage.shape().block_bytes());
    EXPECT_TRUE(std::equal(before.begin(), before.begin() + kTarget * block_bytes, after.begin()));
    // Writing the four slots again as they were before gives what was before: no other slot of the block changed.
    Matrix zero(4, kHeads * 48);
    std::vector<int32_t> slots;
    for (const KvSummary& summary : kSummaries) slots.push_back(summary.slot);
    Stored c(one, format, 48, 1.0f);
    kv_write(a.layer(), zero.view(), zero.view(), slots, one.ctx);
    kv_write(c.layer(), zero.view(), zero.view(), slots, one.ctx);
    EXPECT_EQ(bytes(a), bytes(c)) << quant::to_string(format);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Summaries, testing::ValuesIn(cpu_backends()), backend_test_name);

TEST(SummaryChecks, WhatCannotBeSummarizedIsRefused) {
  Bench bench("");
  Stored stored(bench, KvFormat::f32, 16, 1.0f);
  const auto why = [&](const KvSummary& summary) -> std::string {
    try {
      summarize_kv(stored.layer(), {&summary, 1}, stored.blocks, stored.rotations(), bench.ctx);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      return error.what();
    }
    return "";
  };
  const KvSummary good{
      .block_begin = 1, .first_key = 4, .num_tokens = 20, .position = 34, .slot = 146, .slot_position = 40};
  const auto with = [&](auto member, int value) {
    KvSummary summary = good;
    summary.*member = value;
    return summary;
  };
  EXPECT_EQ(why(good), "");
  EXPECT_EQ(why(with(&KvSummary::num_tokens, 0)), "summary 0 is of 0 tokens from key 4 of block 1 on");
  EXPECT_EQ(why(with(&KvSummary::first_key, -1)), "summary 0 is of 20 tokens from key -1 of block 1 on");
  EXPECT_EQ(why(with(&KvSummary::num_tokens, 125)), "summary 0: its tokens are not all in the 9 blocks");
  EXPECT_EQ(why(with(&KvSummary::position, 181)),
            "summary 0: positions from 181 on are outside the rotation table of 200");
  EXPECT_EQ(why(with(&KvSummary::slot_position, 200)), "summary 0: position 200 is outside the rotation table of 200");
  EXPECT_EQ(why(with(&KvSummary::slot, 7 * 16 + 15)), "summary 0: slot 127 is in a block of its own tokens");
  EXPECT_EQ(why(with(&KvSummary::slot, 6 * 16)), "");

  KvLayer sealed = stored.layer();
  sealed.format = KvFormat::int4;
  EXPECT_EQ(code_of([&] {
              summarize_kv(sealed, {&good, 1}, stored.blocks, stored.rotations(), bench.ctx);
            }),
            ErrorCode::unsupported);

  KernelTable plain = *bench.backend.kernels;
  plain.name = "plain";
  plain.summarize_kv = nullptr;
  bench.ctx.kernels = &plain;
  EXPECT_EQ(code_of([&] {
              summarize_kv(stored.layer(), {&good, 1}, stored.blocks, stored.rotations(), bench.ctx);
            }),
            ErrorCode::unsupported);
}

}  // namespace
}  // namespace nb::ops
