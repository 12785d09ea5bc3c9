// Scheduler and StepTimes together over a machine that only says how long a step takes: prompts that come all at once
// beside streams.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "engine/fake_requests.h"
#include "engine/scheduler.h"
#include "engine/step_times.h"

namespace nb::engine {
namespace {

constexpr double kFixed = 0.004;     // seconds of any step
constexpr double kDecode = 0.33e-3;  // of a sequence that decodes
constexpr double kKey = 0.65e-6;     // of a key that a row attends to
constexpr RequestId kFirstNew = 1000;

struct Burst {
  int streams = 8;
  int arrivals = 16;
  int slots = 64;
  int prompt = 128;
  int answer = 64;
  double row = 0.33e-3;      ///< seconds of a prompt row
  bool knows_demand = true;  ///< otherwise the budget is that of few who wait
};

struct Outcome {
  std::map<RequestId, double> first_token;  ///< seconds after the arrival
  std::vector<double> stretches;            ///< of steps with prompt rows while somebody streams, over the step without
  std::vector<double> allowed;              ///< for each of them
  int idle_steps = 0;                       ///< without prompt rows, while there are some to compute
  double seconds = 0.0;                     ///< until all who arrived have ended

  std::vector<double> firsts() const {
    std::vector<double> times;
    for (const auto& [id, time] : first_token) times.push_back(time);
    return times;
  }
  double median_first() const {
    std::vector<double> times = firsts();
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }
  double last_first() const {
    const std::vector<double> times = firsts();
    return *std::max_element(times.begin(), times.end());
  }
};

class Simulation {
 public:
  explicit Simulation(const Burst& burst)
      : burst_(burst), scheduler_({.max_batch_tokens = 512, .max_num_seqs = burst.slots}, 20'000) {}

  Outcome run() {
    for (int i = 0; i < burst_.streams; ++i) submit(i + 1, 16, 900);
    for (int i = 0; i < 60 || scheduler_.demand().waiting > 0; ++i) step();
    clock_ = 0.0;
    outcome_ = {};
    for (int i = 0; i < burst_.arrivals; ++i) submit(kFirstNew + i, burst_.prompt, burst_.answer);
    left_ = burst_.arrivals;
    for (int i = 0; i < 20'000 && left_ > 0; ++i) step();
    EXPECT_EQ(left_, 0) << "some never end";
    EXPECT_EQ(outcome_.first_token.size(), static_cast<std::size_t>(burst_.arrivals));
    outcome_.seconds = clock_;
    return outcome_;
  }

 private:
  void submit(RequestId id, int prompt, int answer) {
    std::unique_ptr<Sequence> sequence = make_sequence(id, prompt, answer);
    sequence->request.streams = true;
    scheduler_.submit(std::move(sequence));
  }

  void step() {
    const Demand demand = scheduler_.demand();
    const Demand told = burst_.knows_demand ? demand : Demand{.streaming = demand.streaming, .waiting = 0};
    const PromptBudget budget = times_.prompt_budget(told);
    const StepPlan& plan = scheduler_.plan(budget);
    int decodes = 0;
    double decode_keys = 0.0;
    double keys = 0.0;
    for (const PlannedSequence& entry : plan.entries) {
      const double own = entry.count * (entry.first + 0.5 * (entry.count + 1));
      const bool is_decode = entry.count == 1 && entry.samples;
      decodes += is_decode ? 1 : 0;
      (is_decode ? decode_keys : keys) += own;
    }
    const int prompt_rows = plan.num_tokens - decodes;
    const double without = kFixed + kDecode * decodes + kKey * decode_keys;
    const double exact = without + burst_.row * prompt_rows + kKey * keys;
    const double seconds = exact * std::uniform_real_distribution<double>(0.97, 1.03)(random_);
    if (decodes > 0 && demand.waiting > 0) {
      if (prompt_rows > 0) {
        outcome_.stretches.push_back(exact / without);
        outcome_.allowed.push_back(StepTimes::stretch(told));
      } else {
        EXPECT_EQ(budget.work, 0) << "prompts starve";
        ++outcome_.idle_steps;
      }
    }
    times_.record(decodes, prompt_rows, keys, seconds);
    clock_ += seconds;
    for (const PlannedSequence& entry : plan.entries) {
      const bool is_first = entry.samples && entry.sequence->num_generated() == 0;
      if (is_first && entry.sequence->id >= kFirstNew) outcome_.first_token[entry.sequence->id] = clock_;
    }
    scheduler_.commit(plan, std::vector<TokenId>(plan.entries.size(), 100));
    for (const auto& sequence : scheduler_.finished()) left_ -= sequence->id >= kFirstNew ? 1 : 0;
    scheduler_.forget_finished();
    scheduler_.fresh_blocks().clear();
    scheduler_.freed_blocks().clear();
  }

  Burst burst_;
  Scheduler scheduler_;
  StepTimes times_;
  Outcome outcome_;
  double clock_ = 0.0;
  int left_ = 0;
  std::mt19937 random_{7};
};

Outcome run(const Burst& burst) { return Simulation(burst).run(); }

double share_above(const std::vector<double>& values, double limit) {
  const auto above = std::count_if(values.begin(), values.end(), [&](double value) { return value > limit; });
  return static_cast<double>(above) / static_cast<double>(values.size());
}

/// What the streams felt over what the rule allows.
std::vector<double> over_allowed(const Outcome& outcome) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < outcome.stretches.size(); ++i) {
    ratios.push_back(outcome.stretches[i] / outcome.allowed[i]);
  }
  return ratios;
}

TEST(PromptBurst, ManyWhoWaitGetTheirFirstTokensSooner) {
  for (const Burst burst : {Burst{}, Burst{.streams = 4, .arrivals = 4}, Burst{.streams = 16, .arrivals = 48},
                            Burst{.streams = 2, .arrivals = 16, .prompt = 800}}) {
    Burst before = burst;
    before.knows_demand = false;
    const Outcome few = run(before);
    const Outcome many = run(burst);
    EXPECT_LT(many.median_first(), 0.75 * few.median_first()) << burst.arrivals;
    EXPECT_LT(many.last_first(), 0.9 * few.last_first()) << burst.arrivals;
    EXPECT_LT(many.seconds, 0.95 * few.seconds) << burst.arrivals;
  }
}

TEST(PromptBurst, StreamsFeelWhatTheRuleSaysAndNoMore) {
  for (const Burst burst : {Burst{}, Burst{.slots = 16}, Burst{.streams = 4, .arrivals = 4}, Burst{.arrivals = 1},
                            Burst{.streams = 16, .arrivals = 48}, Burst{.streams = 1, .arrivals = 16, .prompt = 800}}) {
    const Outcome outcome = run(burst);
    // The very first prompts are computed before anything is known about their rows.
    EXPECT_LT(share_above(over_allowed(outcome), 1.15), 0.06) << burst.streams << '+' << burst.arrivals;
    EXPECT_GT(share_above(over_allowed(outcome), 0.85), 0.8) << burst.streams << '+' << burst.arrivals;
    EXPECT_LT(share_above(outcome.stretches, 1.1 * StepTimes::kLongestEver), 0.02);
  }
}

TEST(PromptBurst, FewWhoWaitDisturbAsLittleAsEver) {
  const Outcome known = run({.streams = 8, .arrivals = 2});
  const Outcome unknown = run({.streams = 8, .arrivals = 2, .knows_demand = false});
  EXPECT_EQ(known.firsts(), unknown.firsts());
  EXPECT_EQ(known.stretches, unknown.stretches);
  EXPECT_LT(share_above(known.stretches, 2.0), 0.06);
}

TEST(PromptBurst, WhoFindsNoSlotDoesNotCount) {
  const Outcome outcome = run({.streams = 16, .arrivals = 12, .slots = 18, .prompt = 400});
  EXPECT_LT(share_above(outcome.stretches, 2.0), 0.02) << "two slots are no crowd";
}

TEST(PromptBurst, FirstComeFirstServed) {
  for (const Burst burst :
       {Burst{}, Burst{.streams = 0, .arrivals = 40}, Burst{.streams = 2, .arrivals = 9, .slots = 6}}) {
    const std::vector<double> firsts = run(burst).firsts();
    EXPECT_TRUE(std::is_sorted(firsts.begin(), firsts.end()));
  }
}

// Whatever a row costs and however many stream, every step but those that measure takes prompts on.
TEST(PromptBurst, NoBudgetStarvesPrompts) {
  for (const double row : {1e-6, 0.33e-3, 0.05, 3.0}) {
    for (const int streams : {1, 8, 60}) {
      for (const int arrivals : {1, 5, 40}) {
        const Outcome outcome = run({.streams = streams, .arrivals = arrivals, .prompt = 100, .answer = 3, .row = row});
        const auto with_prompts = static_cast<int>(outcome.stretches.size());
        EXPECT_LE(outcome.idle_steps, 2 + with_prompts / StepTimes::kProbeEvery) << row << ' ' << streams;
        EXPECT_LE(with_prompts, 100 * arrivals) << row << ' ' << streams;
      }
    }
  }
}

}  // namespace
}  // namespace nb::engine
