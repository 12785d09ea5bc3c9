// Random runs of the scheduler over a memory that knows of every slot what must be in it: arrivals, lengths, stops,
// cancellations, namespaces, several answers, policies of keys, drafts that are right or wrong.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/effort.h"
#include "base/error.h"
#include "engine/scheduler.h"
#include "sampling/accept.h"

namespace nb::engine {
namespace {

/// A value for the KV of the last of `tokens`, which depends on all of them, as KV does.
std::uint64_t kv_of(std::span<const TokenId> tokens) {
  std::uint64_t value = 1469598103934665603u;
  for (const TokenId token : tokens) value = (value ^ static_cast<std::uint64_t>(token)) * 1099511628211u;
  return value;
}

/// The same of a sequence's token or draft at a position: behind what its policy hides, of nobody else's.
std::uint64_t kv_of(const Sequence& sequence, int position) {
  const auto tokens = sequence.text_with(static_cast<int>(sequence.drafts.size()));
  const std::uint64_t value = kv_of(tokens.first(static_cast<std::size_t>(position) + 1));
  const int exact = sequence.request.keeps_kv ? ops::exact_tokens(sequence.request.key_policy) : 0;
  return position < exact ? value : value + static_cast<std::uint64_t>(sequence.id);
}

/// The token that answer `choice` of the random runs continues `tokens` with; 0 stops it.
TokenId next_token(std::span<const TokenId> tokens, int choice) {
  return static_cast<TokenId>(((kv_of(tokens) >> 20) + 7 * static_cast<std::uint64_t>(choice)) % 16);
}

using AnswerKey = std::pair<RequestId, int>;

/// What must become of an answer in the random runs below.
struct Expected {
  std::vector<TokenId> tokens;  // prompt and output
  int num_prompt;
  bool cancelled = false;
  bool ended = false;
};

/// Drafts of any number, each right with the same probability; some sequences get none.
class RandomDrafts final : public DraftSource {
 public:
  RandomDrafts(unsigned seed, double right) : random_(seed), is_right_(right) {}

  void propose(std::span<const DraftCandidate> candidates, DraftRoom room) override {
    EXPECT_GE(room.free_rows, 1);
    int left = room.free_rows;
    for (const DraftCandidate& candidate : candidates) {
      EXPECT_GE(candidate.most, 1);
      EXPECT_TRUE(candidate.sequence->drafts.empty());
      int count = std::uniform_int_distribution<int>(0, 20)(random_);
      count = std::min({count, candidate.most, left});
      left -= count;
      std::vector<TokenId> text = candidate.sequence->tokens;
      for (; count > 0; --count) {
        const TokenId next = next_token(text, candidate.sequence->choice);
        text.push_back(is_right_(random_) ? next : (next + 1) % 16);
        candidate.sequence->drafts.push_back(text.back());
      }
    }
  }

 private:
  std::mt19937 random_;
  std::bernoulli_distribution is_right_;
};

/// Random arrivals, lengths, stops, cancellations, namespaces and numbers of answers on one random configuration, over
/// a memory that holds for each slot the value of its KV. Many prompts begin alike.
class RandomRun {
 public:
  explicit RandomRun(unsigned seed)
      : random_(seed),
        limits_{.max_batch_tokens = pick(1, 40),
                .max_num_seqs = pick(1, 8),
                .max_waiting = pick(0, 1) * pick(1, 6),
                .seals_keys = pick(0, 3) == 0},
        scheduler_(limits_, pick(2, 40), pick(0, 3) > 0 ? std::optional<std::string>("test") : std::nullopt),
        memory_(static_cast<std::size_t>(scheduler_.pool().num_blocks()) * kBlockTokens, kGarbage),
        drafts_(seed, 0.25 * pick(0, 4)) {
    if (pick(0, 2) > 0) scheduler_.set_draft_source(drafts_);
  }

  void run() {
    for (int step = 0; step < 150; ++step) {
      arrive();
      cancel_some();
      one_step();
    }
    for (int step = 0; scheduler_.has_work() && step < 60'000; ++step) one_step();
    EXPECT_FALSE(scheduler_.has_work());
    EXPECT_EQ(scheduler_.pool().num_available(), scheduler_.pool().num_blocks());
    for (const auto& [key, expected] : answers_) EXPECT_TRUE(expected.ended) << "request " << key.first;
    EXPECT_FALSE(answers_.empty());
  }

  const SchedulerCounters& counters() const { return scheduler_.counters(); }
  int num_longer_than_the_pool() const { return num_longer_than_the_pool_; }
  int num_dropped() const { return num_dropped_; }
  int num_summaries() const { return num_summaries_; }
  int num_drafted() const { return num_drafted_; }
  int num_accepted() const { return num_accepted_; }

 private:
  static constexpr std::uint64_t kGarbage = 0xDEAD;

  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  /// Beginnings from a small set, so that prompts share blocks, and sometimes all of a prompt.
  std::vector<TokenId> prompt() {
    std::vector<TokenId> tokens;
    const int shared = pick(0, 6) * pick(0, 16);
    const int family = pick(1, 3);
    for (int i = 0; i < shared; ++i) tokens.push_back(family * 1000 + i);
    const int own = tokens.empty() ? pick(1, 100) : pick(0, 1) * pick(0, 40);
    for (int i = 0; i < own; ++i) tokens.push_back(pick(1, 5));
    if (tokens.empty()) tokens.push_back(1);
    return tokens;
  }

  ops::KeyPolicy policy() {
    ops::KeyPolicy policy{.rule = static_cast<ops::KeyRule>(pick(0, 5))};
    if (policy.rule == ops::KeyRule::full) return policy;
    policy.window = pick(1, 60);
    if (policy.rule != ops::KeyRule::summary) policy.prefix = pick(0, 1) * pick(1, 40);
    policy.period = pick(1, 3) * (policy.rule == ops::KeyRule::strided ? 1 : kBlockTokens);
    if (policy.rule == ops::KeyRule::block) policy.keep = pick(0, policy.period / kBlockTokens) * kBlockTokens;
    if (policy.rule == ops::KeyRule::budget) policy.keep = pick(0, 3);
    return policy;
  }

  void arrive() {
    if (pick(0, 2) == 0) return;
    Request request;
    request.prompt = prompt();
    if (pick(0, 1) == 0) request.key_policy = policy();
    if (pick(0, 9) == 0) request.speculative = false;
    request.keeps_kv = pick(0, 39) > 0 || request.key_policy.rule != ops::KeyRule::full;
    request.max_tokens = pick(0, 40);
    request.n = pick(0, 3) > 0 || !request.keeps_kv ? 1 : pick(2, 4);
    request.cache_salt = pick(0, 4) > 0 ? "" : "other";
    if (request.max_tokens == 0 || pick(0, 9) == 0) request.prompt_logprobs = 0;
    std::vector<std::unique_ptr<Sequence>> sequences;
    std::vector<Expected> expected;
    for (int choice = 0; choice < request.n; ++choice) {
      Request one = request;
      if (choice > 0) one.prompt_logprobs.reset();
      if (choice > 0 && one.max_tokens == 0) one.max_tokens = 1;
      sequences.push_back(std::make_unique<Sequence>(next_id_, one, std::vector<TokenId>{0}, 150, choice));
      expected.push_back(finished(*sequences.back()));
    }
    const auto longest = [](const auto& a, const auto& b) { return a->max_len < b->max_len; };
    const int max_len = (*std::max_element(sequences.begin(), sequences.end(), longest))->max_len;
    const bool fits = kv::BlockTable::blocks_for(max_len) <= scheduler_.pool().num_blocks();
    const bool is_lossy = request.key_policy.rule != ops::KeyRule::full;
    try {
      scheduler_.submit(std::move(sequences));
      EXPECT_TRUE(fits || is_lossy);
      num_longer_than_the_pool_ += fits ? 0 : 1;
      for (int choice = 0; choice < request.n; ++choice) {
        answers_[{next_id_, choice}] = expected[static_cast<std::size_t>(choice)];
      }
      ++next_id_;
    } catch (const Error& error) {
      // Summaries need blocks beside those that they are made of.
      const bool may_not_fit = !fits || request.key_policy.rule == ops::KeyRule::summary;
      EXPECT_TRUE(error.code() == ErrorCode::overloaded || (may_not_fit && error.code() == ErrorCode::invalid_argument))
          << error.what();
    }
  }

  static Expected finished(const Sequence& sequence) {
    Expected expected{.tokens = sequence.tokens, .num_prompt = sequence.num_prompt};
    while (static_cast<int>(expected.tokens.size()) < sequence.max_len) {
      const TokenId token = next_token(expected.tokens, sequence.choice);
      if (token == 0) break;
      expected.tokens.push_back(token);
    }
    return expected;
  }

  void cancel_some() {
    if (next_id_ == 1 || pick(0, 9) > 0) return;
    const RequestId id = static_cast<RequestId>(pick(1, static_cast<int>(next_id_) - 1));
    bool lives = false;
    for (auto& [key, expected] : answers_) {
      if (key.first != id || expected.ended) continue;
      lives = true;
      expected.cancelled = true;
    }
    EXPECT_EQ(scheduler_.cancel(id), lives);
  }

  PromptBudget random_budget() {
    if (pick(0, 3) > 0) return {};
    return {.work = pick(1, 8), .row_weight = 1, .key_weight = pick(0, 2)};
  }

  void one_step() {
    const StepPlan& plan = scheduler_.plan(random_budget());
    update_memory();
    check_plan(plan);
    compute(plan);
    scheduler_.commit(plan, draw(plan));
    scheduler_.check_invariants();
    update_memory();
    for (const auto& sequence : scheduler_.finished()) check_end(*sequence);
    scheduler_.forget_finished();
  }

  /// The token behind every row that samples, as long as the drafts before it are right.
  std::vector<TokenId> draw(const StepPlan& plan) {
    std::vector<TokenId> sampled(static_cast<std::size_t>(plan.num_draws), sampling::kNotDrawn);
    for (const auto& entry : plan.entries) {
      const Sequence& sequence = *entry.sequence;
      num_drafted_ += entry.num_drafts;
      for (int i = 0; i < entry.num_draws(); ++i) {
        const TokenId token = next_token(sequence.text_with(i), sequence.choice);
        sampled[static_cast<std::size_t>(entry.first_draw + i)] = token;
        if (i == entry.num_drafts || token != sequence.drafts[static_cast<std::size_t>(i)]) break;
        ++num_accepted_;
      }
    }
    return sampled;
  }

  void update_memory() {
    const auto block = [&](BlockId id) { return memory_.begin() + static_cast<std::ptrdiff_t>(id) * kBlockTokens; };
    for (const auto& copy : scheduler_.copies()) std::copy_n(block(copy.from), kBlockTokens, block(copy.to));
    for (const BlockId id : scheduler_.freed_blocks()) std::fill_n(block(id), kBlockTokens, kGarbage);
    for (const BlockId id : scheduler_.fresh_blocks()) std::fill_n(block(id), kBlockTokens, 0);
    scheduler_.copies().clear();
    scheduler_.freed_blocks().clear();
    scheduler_.fresh_blocks().clear();
  }

  /// Writes the KV of every planned row, then looks at all that the rows attend to.
  void compute(const StepPlan& plan) {
    const auto slot = [](const Sequence& sequence, int position) {
      return static_cast<std::size_t>(sequence.table.slot_of(position));
    };
    for (const auto& entry : plan.entries) {
      for (int position = entry.first; position < entry.first + entry.count; ++position) {
        const std::size_t where = slot(*entry.sequence, position);
        const BlockId block = static_cast<BlockId>(where) / kBlockTokens;
        ASSERT_EQ(scheduler_.pool().ref_count(block), 1) << "a shared block is written";
        ASSERT_FALSE(scheduler_.pool().is_kept(block)) << "a cached block is written";
        memory_[where] = kv_of(*entry.sequence, position);
      }
    }
    for (const auto& entry : plan.entries) {
      const Sequence& sequence = *entry.sequence;
      for (int position = 0; position < entry.first + entry.count; ++position) {
        const int block = position / kBlockTokens;
        if (sequence.table.blocks()[static_cast<std::size_t>(block)] == kNoBlock) {
          ASSERT_TRUE(ops::hidden_bits(sequence.request.key_policy, entry.first, block) >> position % kBlockTokens & 1)
              << "request " << sequence.id << " lacks position " << position;
          ++num_dropped_;
          continue;
        }
        ASSERT_EQ(memory_[slot(sequence, position)], kv_of(sequence, position))
            << "request " << sequence.id << " position " << position;
      }
      check_summaries(entry);
    }
  }

  /// Each group that a row sees through its summary has one, and its tokens are there while that is made.
  void check_summaries(const PlannedSequence& entry) {
    const Sequence& sequence = *entry.sequence;
    const ops::KeyPolicy& policy = sequence.request.key_policy;
    if (policy.rule != ops::KeyRule::summary) return;
    const int last = entry.first + entry.count - 1;
    ASSERT_EQ(sequence.summaries.length(), ops::tail_begin(policy, last) / policy.period);
    for (int group = entry.first_summary; group < sequence.summaries.length(); ++group) {
      for (int token = group * policy.period; token < (group + 1) * policy.period; ++token) {
        ASSERT_NE(sequence.table.blocks()[static_cast<std::size_t>(token / kBlockTokens)], kNoBlock);
      }
      ++num_summaries_;
    }
  }

  void check_plan(const StepPlan& plan) {
    int total = 0;
    std::map<AnswerKey, int> seen;
    bool sliced = false;
    for (const auto& entry : plan.entries) {
      const Sequence& sequence = *entry.sequence;
      EXPECT_EQ(++seen[AnswerKey(sequence.id, sequence.choice)], 1);
      EXPECT_GE(entry.count, 1);
      EXPECT_EQ(entry.first, sequence.computed_len());
      EXPECT_LE(entry.first + entry.count, sequence.len() + entry.num_drafts);
      EXPECT_EQ(static_cast<int>(sequence.drafts.size()), entry.num_drafts);
      EXPECT_LE(sequence.len() + entry.num_drafts, sequence.max_len - (entry.num_drafts > 0 ? 1 : 0));
      EXPECT_TRUE(entry.num_drafts == 0 || (sequence.request.keeps_kv && sequence.request.speculative.value_or(true)));
      if (limits_.seals_keys) check_groups(entry);
      EXPECT_GE(sequence.table.length(), entry.first + entry.count);
      const int num_tokens = entry.count - entry.num_drafts;
      EXPECT_EQ(entry.samples, entry.first + num_tokens == sequence.len() && sequence.generates());
      EXPECT_FALSE(sequence.ends_early());
      EXPECT_FALSE(sliced) << "a younger sequence computes while an older prompt was cut short";
      sliced = entry.first + num_tokens < sequence.len() && !sequence.drops_kv();  // which may lack blocks
      total += entry.count;
    }
    EXPECT_EQ(total, plan.num_tokens);
    EXPECT_LE(total, limits_.max_batch_tokens);
    // Something always moves: a step without rows only ends cancelled sequences.
    const bool live = std::any_of(answers_.begin(), answers_.end(),
                                  [](const auto& entry) { return !entry.second.ended && !entry.second.cancelled; });
    idle_steps_ = live && total == 0 ? idle_steps_ + 1 : 0;
    EXPECT_LE(idle_steps_, 1);
  }

  /// No group of keys is full with a draft in it.
  static void check_groups(const PlannedSequence& entry) {
    const int first_draft = entry.first + entry.count - entry.num_drafts;
    for (int draft = first_draft; draft < entry.first + entry.count; ++draft) {
      EXPECT_NE(draft % kBlockTokens, kBlockTokens - 1);
    }
  }

  void check_end(const Sequence& sequence) {
    Expected& expected = answers_.at({sequence.id, sequence.choice});
    EXPECT_FALSE(expected.ended) << "request " << sequence.id << " ended twice";
    expected.ended = true;
    EXPECT_EQ(sequence.table.capacity(), 0);
    if (sequence.finish_reason == FinishReason::abort) {
      EXPECT_TRUE(expected.cancelled);
    } else {
      EXPECT_EQ(sequence.tokens, expected.tokens);
    }
  }

  std::mt19937 random_;
  SchedulerLimits limits_;
  Scheduler scheduler_;
  std::vector<std::uint64_t> memory_;
  RandomDrafts drafts_;
  std::map<AnswerKey, Expected> answers_;
  RequestId next_id_ = 1;
  int idle_steps_ = 0;
  int num_longer_than_the_pool_ = 0;
  int num_dropped_ = 0;
  int num_summaries_ = 0;
  int num_drafted_ = 0;
  int num_accepted_ = 0;
};

TEST(SchedulerRandom, RunsKeepTheInvariants) {
  const unsigned num_seeds = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 3000 : is_reduced() ? 60 : 300;
  SchedulerCounters total;
  int longer = 0, dropped = 0, summaries = 0, drafted = 0, accepted = 0;
  for (unsigned seed = 0; seed < num_seeds && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    RandomRun run(seed);
    run.run();
    total.preemptions += run.counters().preemptions;
    total.prefix_hit_tokens += run.counters().prefix_hit_tokens;
    total.forked_tokens += run.counters().forked_tokens;
    longer += run.num_longer_than_the_pool();
    dropped += run.num_dropped();
    summaries += run.num_summaries();
    drafted += run.num_drafted();
    accepted += run.num_accepted();
  }
  EXPECT_GT(total.preemptions, num_seeds);
  EXPECT_GT(total.prefix_hit_tokens, 100 * num_seeds);
  EXPECT_GT(total.forked_tokens, 20 * num_seeds);
  EXPECT_GT(longer, static_cast<int>(num_seeds) / 100);
  EXPECT_GT(dropped, 1000 * static_cast<int>(num_seeds));
  EXPECT_GT(summaries, static_cast<int>(num_seeds));
  EXPECT_GT(drafted, 500 * static_cast<int>(num_seeds));
  EXPECT_GT(accepted, drafted / 10);
  EXPECT_LT(accepted, drafted * 9 / 10);
}

}  // namespace
}  // namespace nb::engine
