#include "engine/step_times.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace nb::engine {
namespace {

constexpr Demand kFew{.streaming = 4, .waiting = 1};

/// Rows that the budget pays for from a position on, one by one.
int rows_from(const PromptBudget& budget, int position) {
  std::int64_t left = budget.work;
  int rows = 0;
  while (rows < 512 && left >= budget.weight(position + rows)) left -= budget.weight(position + rows++);
  return std::max(rows, 1);  // a prompt always goes on
}

double keys_of(int position, int rows) { return rows * (position + 0.5 * (rows + 1)); }

/// A machine that takes exactly this long, but for noise.
struct Machine {
  double decode = 0.008;
  double row = 0.33e-3;
  double key = 0.65e-6;
  double context = 0.0;  // per key before the first row of a step: reading them, for however many rows
  double noise = 0.05;
  double growth = 0.0;  // of decode, per step
  std::mt19937 random{1};

  double seconds(int decode_rows, int rows, double keys) {
    decode += growth;
    const double first = rows > 0 ? keys / rows : 0.0;
    const double exact = (decode_rows > 0 ? decode : 0.5 * decode) + row * rows + key * keys + context * first;
    return exact * std::uniform_real_distribution<double>(1.0 - noise, 1.0 + noise)(random);
  }
};

/// Runs a prompt from `position` to `end` beside decodes; returns the length of each step in steps without prompts.
std::vector<double> run_prompt(StepTimes& times, Machine& machine, int position, int end) {
  std::vector<double> lengths;
  while (position < end) {
    if (times.prompt_budget(kFew).work == 0) {
      times.record(4, 0, 0.0, machine.seconds(4, 0, 0.0));
      continue;
    }
    const int rows = std::min(rows_from(times.prompt_budget(kFew), position), end - position);
    const double keys = keys_of(position, rows);
    const double seconds = machine.seconds(4, rows, keys);
    times.record(4, rows, keys, seconds);
    lengths.push_back(seconds / machine.decode);
    position += rows;
  }
  return lengths;
}

constexpr double kTooLong = 1.25 * StepTimes::kLongest;
constexpr double kMostOfIt = 0.8 * StepTimes::kLongest;

double share_above(const std::vector<double>& values, double limit) {
  const auto above = std::count_if(values.begin(), values.end(), [&](double value) { return value > limit; });
  return static_cast<double>(above) / static_cast<double>(values.size());
}

StepTimes after_decodes(Machine& machine) {
  StepTimes times;
  for (int i = 0; i < 50; ++i) times.record(4, 0, 0.0, machine.seconds(4, 0, 0.0));
  return times;
}

TEST(StepTimes, BeforeAnythingIsKnown) {
  StepTimes times;
  const PromptBudget first = times.prompt_budget(kFew);
  EXPECT_EQ(first.work, StepTimes::kFirstRows * first.row_weight);
  EXPECT_GT(first.key_weight, 0) << "the beginning of a prompt behind a long prefix would be too long";
  times.record(4, 0, 0.0, 0.004);
  EXPECT_EQ(times.prompt_budget(kFew).work, first.work);  // nothing about prompts yet
  EXPECT_LT(rows_from(first, 4000), 20);
}

TEST(StepTimes, AStepWithPromptsTakesWhatItMay) {
  Machine machine;
  StepTimes times = after_decodes(machine);
  run_prompt(times, machine, 0, 4000);
  for (int prompt = 0; prompt < 3; ++prompt) {
    const std::vector<double> lengths = run_prompt(times, machine, 0, 4000);
    EXPECT_LT(share_above(lengths, kTooLong), 0.01);
    EXPECT_GT(share_above(lengths, kMostOfIt), 0.8) << "time that prompts might have had";
    EXPECT_LT(*std::max_element(lengths.begin(), lengths.end()), 3.0);
  }
}

TEST(StepTimes, DecodesThatGetSlowerMeanwhileAreFollowed) {
  Machine machine{.growth = 0.02e-3};
  StepTimes times = after_decodes(machine);
  run_prompt(times, machine, 0, 4000);
  const double before = machine.decode;
  const std::vector<double> lengths = run_prompt(times, machine, 0, 4000);
  EXPECT_GT(machine.decode, 1.3 * before);
  EXPECT_LT(share_above(lengths, kTooLong), 0.02);
  EXPECT_GT(share_above(lengths, kMostOfIt), 0.7) << "prompts that starve";
}

TEST(StepTimes, FewRowsBecomeMoreWhereTheyCostLittleMore) {
  for (const double noise : {0.0, 0.05}) {
    // Behind 3,500 keys the first row of a step costs 5.5 ms, three more 3 ms together.
    Machine machine{.key = 0.2e-6, .context = 1.2e-6, .noise = noise};
    machine.decode = 0.009 / (StepTimes::kLongest - 1.0);  // 9 ms for prompts
    StepTimes times = after_decodes(machine);
    for (int i = 0; i < 20; ++i) times.record(4, 1, 3500.0, machine.decode + 0.007);  // a row seems to cost 7 ms
    ASSERT_EQ(rows_from(times.prompt_budget(kFew), 3500), 1);
    EXPECT_LT(run_prompt(times, machine, 3500, 4000).size(), 500u / 3) << noise;
  }
}

TEST(StepTimes, AStepWithoutPromptsComesAgainAndAgain) {
  Machine machine;
  StepTimes times = after_decodes(machine);
  for (int i = 0; i < StepTimes::kProbeEvery; ++i) {
    EXPECT_GT(times.prompt_budget(kFew).work, 0) << i;
    times.record(4, 8, keys_of(0, 8), machine.seconds(4, 8, keys_of(0, 8)));
  }
  EXPECT_EQ(times.prompt_budget(kFew).work, 0);
  times.record(4, 0, 0.0, machine.decode);
  EXPECT_GT(times.prompt_budget(kFew).work, 0);
}

TEST(StepTimes, TheFirstPromptEverIsSlicedToo) {
  for (const int start : {0, 3000}) {  // with nothing cached, and behind a cached prefix
    Machine machine;
    StepTimes times = after_decodes(machine);
    EXPECT_LT(share_above(run_prompt(times, machine, start, 6000), kTooLong), 0.02) << start;
  }
}

TEST(StepTimes, AJumpToALongContextIsForeseen) {
  for (const int known : {300, 4000}) {  // what a key costs is a guess, and learnt
    Machine machine;
    StepTimes times = after_decodes(machine);
    for (int prompt = 0; prompt < 5; ++prompt) run_prompt(times, machine, 0, known);
    for (int prompt = 0; prompt < 5; ++prompt) run_prompt(times, machine, 0, 300);
    EXPECT_LT(run_prompt(times, machine, 3000, 3100).front(), known > 3000 ? 3.0 : 4.0) << known;
  }
}

TEST(StepTimes, OtherMachinesAndModels) {
  for (const double scale : {0.1, 1.0, 20.0}) {
    for (const double key : {0.0, 0.1e-6, 2.5e-6}) {
      Machine machine{.decode = 0.008 * scale, .row = 0.33e-3 * scale, .key = key * scale};
      StepTimes times = after_decodes(machine);
      run_prompt(times, machine, 0, 4000);
      const std::vector<double> lengths = run_prompt(times, machine, 0, 4000);
      const double one_row = 1.0 + (machine.row + machine.key * 4000) / machine.decode;  // the least there is
      EXPECT_LT(share_above(lengths, std::max(kTooLong, 1.1 * one_row)), 0.02) << scale << ' ' << key;
      EXPECT_GT(share_above(lengths, kMostOfIt), 0.6) << scale << ' ' << key;
    }
  }
}

TEST(StepTimes, PromptsAloneCountIfTheyAreLong) {
  Machine machine{.noise = 0.0};
  StepTimes times = after_decodes(machine);
  for (int i = 0; i < 100; ++i) times.record(0, 512, keys_of(0, 512), 512 * 0.1e-3);
  const PromptBudget budget = times.prompt_budget(kFew);
  EXPECT_NEAR(rows_from(budget, 0) * 0.1e-3, (StepTimes::kLongest - 1.0) * machine.decode, 0.3 * machine.decode);
  times.record(0, StepTimes::kFewestRowsAlone - 1, 10.0, 5.0);  // too few rows to say anything
  EXPECT_EQ(times.prompt_budget(kFew).work, budget.work);
}

TEST(StepTimes, AHiccupIsNotTheRule) {
  Machine machine{.noise = 0.0};
  StepTimes times = after_decodes(machine);
  run_prompt(times, machine, 0, 2000);
  times.record(4, 0, 0.0, machine.decode);
  const int usual = rows_from(times.prompt_budget(kFew), 500);
  times.record(4, usual, keys_of(500, usual), 1.0);  // 50 times what it should take
  EXPECT_GT(rows_from(times.prompt_budget(kFew), 500), usual / 2);
  times.record(4, 0, 0.0, 1.0);
  EXPECT_LT(rows_from(times.prompt_budget(kFew), 500), usual * 3 / 2);
}

TEST(StepTimes, ASlowerMachineIsNoticed) {
  Machine machine;
  StepTimes times = after_decodes(machine);
  run_prompt(times, machine, 0, 4000);
  machine.row *= 3;
  machine.key *= 3;
  run_prompt(times, machine, 0, 400);
  EXPECT_LT(share_above(run_prompt(times, machine, 400, 4000), kTooLong), 0.03);
}

TEST(StepTimes, WhoStreamsLosesInProportionToThoseWhoWait) {
  EXPECT_EQ(StepTimes::stretch({.streaming = 4, .waiting = 0}), StepTimes::kLongest);
  EXPECT_EQ(StepTimes::stretch({.streaming = 4, .waiting = 1}), StepTimes::kLongest);
  EXPECT_EQ(StepTimes::stretch({.streaming = 1, .waiting = 1}), StepTimes::kLongest);  // nobody waits behind it
  EXPECT_EQ(StepTimes::stretch({.streaming = 64, .waiting = 16}), StepTimes::kLongest);
  EXPECT_NEAR(StepTimes::stretch({.streaming = 4, .waiting = 2}), 2.4, 1e-9);  // twice as many, twice as much longer
  EXPECT_NEAR(StepTimes::stretch({.streaming = 8, .waiting = 4}), 2.4, 1e-9);
  EXPECT_NEAR(StepTimes::stretch({.streaming = 8, .waiting = 8}), 3.8, 1e-9);
  EXPECT_EQ(StepTimes::stretch({.streaming = 8, .waiting = 16}), StepTimes::kLongestEver);
  EXPECT_EQ(StepTimes::stretch({.streaming = 1, .waiting = 100'000}), StepTimes::kLongestEver);
  for (int streaming = 1; streaming <= 64; ++streaming) {
    for (int waiting = 0; waiting <= 64; ++waiting) {
      const double one = StepTimes::stretch({.streaming = streaming, .waiting = waiting});
      EXPECT_GE(one, StepTimes::kLongest);
      EXPECT_LE(one, StepTimes::kLongestEver);
      EXPECT_LE(one, StepTimes::stretch({.streaming = streaming, .waiting = waiting + 1}));
      EXPECT_GE(one, StepTimes::stretch({.streaming = streaming + 1, .waiting = waiting}));
    }
  }
}

TEST(StepTimes, TheBudgetGrowsWithTheStretch) {
  Machine machine{.key = 0.0, .noise = 0.0};
  StepTimes times = after_decodes(machine);
  run_prompt(times, machine, 0, 4000);
  const Demand many{.streaming = 4, .waiting = 3};
  const double ratio = (StepTimes::stretch(many) - 1.0) / (StepTimes::kLongest - 1.0);
  EXPECT_NEAR(rows_from(times.prompt_budget(many), 0), ratio * rows_from(times.prompt_budget(kFew), 0), 3.0);
}

TEST(StepTimes, AStepWithoutPromptsComesSoonIfDecodesAreNotKnown) {
  StepTimes times;
  times.record(0, 512, keys_of(0, 512), 0.2);
  EXPECT_GT(times.prompt_budget(kFew).work, 0);
  times.record(4, 64, keys_of(0, 64), 0.03);
  EXPECT_EQ(times.prompt_budget(kFew).work, 0);
  times.record(4, 0, 0.0, 0.008);
  EXPECT_GT(times.prompt_budget(kFew).work, 0);
}

TEST(StepTimes, MoreAndFewerDecodesAreForeseen) {
  const double row = 0.33e-3;
  const auto decode = [&](int rows) { return 0.005 + row * rows; };
  StepTimes times;
  for (int i = 0; i < 50; ++i) times.record(4, 0, 0.0, decode(4));
  for (int i = 0; i < 200; ++i) times.record(0, 512, 0.0, row * 512);  // no keys to keep it simple
  const auto expect_fit = [&](int decodes) {
    const double prompts = rows_from(times.prompt_budget(kFew), 0) * row;
    EXPECT_NEAR(prompts, (StepTimes::kLongest - 1.0) * decode(decodes), 0.15 * decode(decodes)) << decodes;
  };
  expect_fit(4);
  for (const int decodes : {8, 16, 24, 10}) {  // the next step without prompts is far
    const int rows = rows_from(times.prompt_budget(kFew), 0);
    times.record(decodes, rows, 0.0, decode(decodes) + row * rows);
    expect_fit(decodes);
  }
}

}  // namespace
}  // namespace nb::engine
