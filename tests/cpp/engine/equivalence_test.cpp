// Random runs of whole engines: whatever happens around a request, its answer has the bits it has when it runs alone.
//
// A run draws a backend, 1 or 2 threads, slices, number of sequences, cache on or off, and a pool that is ample or a
// fifth of what its answers need; then arrivals, lengths, shared beginnings, continued conversations, namespaces,
// several answers, sampling options, scores, prompts composed of chunks, policies of keys, drafts that are right or
// wrong, and cancellations. The oracle answers each request by itself, without a cache, with chunks of its own and with
// as much memory as it likes.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/effort.h"
#include "base/error.h"
#include "engine/clairvoyant.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

constexpr int kVocab = 320;

using Scores = std::vector<sampling::TokenLogprob>;

bool same_bits(const Scores& a, const Scores& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.token == y.token && x.rank == y.rank &&
           std::bit_cast<std::uint32_t>(x.logprob) == std::bit_cast<std::uint32_t>(y.logprob);
  });
}

/// One model in memory for each number of threads, and an engine on the first that serves as the oracle.
struct Backend {
  Backend(const std::string& name, std::optional<quant::KvFormat> kv_format)
      : format(kv_format),
        one(model::make_tiny_model({.backend = name, .format = quant::Format::q4_0, .num_threads = 1})),
        two(model::make_tiny_model({.backend = name, .format = quant::Format::q4_0, .num_threads = 2})),
        draft(model::make_tiny_model({.backend = name, .format = quant::Format::q4_0})),
        alone(*one, {.kv_format = kv_format, .max_num_seqs = 4, .eos_ids = {0}, .enable_prefix_caching = false}) {}

  std::optional<quant::KvFormat> format;  // none: the default
  std::unique_ptr<model::Model> one;
  std::unique_ptr<model::Model> two;
  std::unique_ptr<model::Model> draft;  // guesses well
  Engine alone;
};

/// What all runs together did, so that none of it is missing by accident.
struct Totals {
  std::int64_t preemptions = 0;
  std::int64_t prefix_hit_tokens = 0;
  std::int64_t forked_tokens = 0;
  std::int64_t aborted = 0;
  std::int64_t completed = 0;
  std::int64_t stopped = 0;
  std::int64_t tight_runs = 0;
  std::int64_t composed = 0;  // completed or stopped
  std::int64_t chunk_hits = 0;
  std::int64_t evictions = 0;
  std::int64_t measured = 0;
  std::int64_t no_room = 0;
  std::int64_t lossy = 0;
  std::int64_t drafted = 0;
  std::int64_t accepted = 0;
};

class RandomEngineRun {
 public:
  RandomEngineRun(Backend& backend, unsigned seed)
      : backend_(backend), random_(seed), tight_(pick(0, 2) > 0), long_answers_(pick(0, 2) > 0) {}

  void run(Totals& totals) {
    const std::size_t num_requests = static_cast<std::size_t>(pick(4, 9));
    for (std::size_t i = 0; i < num_requests; ++i) wanted_.push_back(draw_request());
    EngineOptions options = draw_options();
    if (pick(0, 1) == 0) speculate(options);
    // Two threads seldom: their barriers cost much where other programs use the processors.
    Engine engine(pick(0, 5) > 0 ? *backend_.one : *backend_.two, options);
    serve(engine);
    EngineStats stats = engine.stats();
    totals.chunk_hits += stats.chunk_hits;
    totals.evictions += stats.chunk_evictions;
    totals.measured += stats.measured_tokens;
    remove_chunks(engine);
    stats = engine.stats();
    EXPECT_EQ(stats.blocks_owned, 0);
    totals.preemptions += stats.preemptions;
    totals.prefix_hit_tokens += stats.prefix_hit_tokens;
    totals.forked_tokens += stats.forked_tokens;
    totals.tight_runs += tight_ ? 1 : 0;
    totals.drafted += stats.drafts.drafted;
    totals.accepted += stats.drafts.accepted;
    for (const auto& [id, index] : submitted_) compare(id, wanted_[index], totals);
  }

 private:
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  template <class Value>
  Value one_of(std::initializer_list<Value> values) {
    return values.begin()[pick(0, static_cast<int>(values.size()) - 1)];
  }

  /// A beginning from a small set, or an earlier request with its answer, then tokens of its own.
  std::vector<TokenId> draw_prompt() {
    std::vector<TokenId> tokens;
    const int kind = pick(0, 5);
    if (kind == 0 && !wanted_.empty()) {
      const Request& earlier = wanted_[static_cast<std::size_t>(pick(0, static_cast<int>(wanted_.size()) - 1))];
      tokens = earlier.prompt;
      const auto answer = expected(earlier, 0).tokens;
      tokens.insert(tokens.end(), answer.begin(), answer.end());
    } else if (kind < 4) {
      const auto family = random_request(static_cast<unsigned>(pick(1, 2)), 300, 1).prompt;
      const int shared = pick(0, 9) == 0 ? pick(240, 300) : one_of({pick(1, 100), 16 * pick(1, 5)});
      tokens.assign(family.begin(), family.begin() + shared);
    }
    if (long_answers_ && tokens.size() > 40) tokens.resize(static_cast<std::size_t>(pick(1, 40)));
    const int own = tokens.empty() ? one_of({pick(1, 60), 16 * pick(1, 3)}) : pick(0, 2) * pick(0, 12);
    for (int i = 0; i < own; ++i) tokens.push_back(pick(1, kVocab - 1));
    if (tokens.size() > 400) tokens.resize(400);
    return tokens;
  }

  static void remove_chunks(Engine& engine) {
    while (!engine.chunks().chunks().empty()) {
      ASSERT_TRUE(engine.remove_chunk(engine.chunks().chunks().begin()->first));
    }
  }

  /// Puts the prompt together from plain tokens and chunks of a small set.
  void compose(Request& request) {
    request.prompt.clear();
    request.prompt_logprobs.reset();
    const auto add_plain = [&](int count) {
      const auto plain = random_request(static_cast<unsigned>(pick(1, 2)), 40, 1).prompt;
      request.prompt.insert(request.prompt.end(), plain.begin(), plain.begin() + count);
    };
    add_plain(one_of({0, 0, 16, pick(1, 40)}));
    for (int i = pick(1, 4); i > 0; --i) {
      const int which = pick(0, 5);
      const auto tokens = random_request(50 + static_cast<unsigned>(which), 5 + 13 * which, 1).prompt;
      ChunkSpan span{.begin = static_cast<int>(request.prompt.size()), .count = static_cast<int>(tokens.size())};
      if (pick(0, 2) == 0) span.anchor = random_request(60, which % 2 == 0 ? 1 : 18, 1).prompt;
      request.chunks.push_back(span);
      request.prompt.insert(request.prompt.end(), tokens.begin(), tokens.end());
      if (pick(0, 2) == 0) add_plain(pick(1, 5));
    }
    if (pick(0, 4) > 0) add_plain(pick(1, 20));
    request.reuse.mode = one_of({ReuseMode::isolated, ReuseMode::blend, ReuseMode::blend});
    request.reuse.mask_sink = pick(0, 1) == 0;
    request.reuse.ratio = one_of({0.01, 0.15, 0.6, 1.0});
    request.reuse.selection = pick(0, 2) == 0 ? BlendSelection::first : BlendSelection::deviation;
  }

  sampling::SamplingParams draw_sampling() {
    sampling::SamplingParams params;
    params.temperature = one_of({0.0, 0.0, 0.8, 1.3});
    params.seed = static_cast<std::uint64_t>(pick(1, 1000));
    if (pick(0, 3) == 0) params.top_k = pick(1, 50);
    if (pick(0, 3) == 0) params.top_p = 0.9;
    if (pick(0, 5) == 0) params.min_p = 0.02;
    if (pick(0, 3) == 0) params.repetition_penalty = 1.3;
    if (pick(0, 3) == 0) params.presence_penalty = 0.7;
    if (pick(0, 3) == 0) params.frequency_penalty = -0.4;
    if (pick(0, 5) == 0) params.min_tokens = pick(1, 10);
    if (pick(0, 5) == 0) params.logit_bias = {{pick(0, kVocab - 1), 3.0}};
    if (pick(0, 5) == 0) params.bad_words_token_ids = {{pick(1, kVocab - 1)}};
    if (pick(0, 1) == 0) params.logprobs = pick(0, 3);
    return params;
  }

  Request draw_request() {
    Request request;
    request.prompt = draw_prompt();
    request.sampling = draw_sampling();
    request.max_tokens = pick(0, 4) == 0 ? 1 : pick(2, 24);
    if (long_answers_) request.max_tokens = pick(20, 70);
    request.sampling.min_tokens = std::min(request.sampling.min_tokens, request.max_tokens);
    if (pick(0, 4) == 0) request.n = pick(2, 4);
    if (pick(0, 4) == 0) request.cache_salt = "other";
    if (pick(0, 9) == 0) request.prompt_logprobs = pick(0, 2);
    if (pick(0, 2) == 0) {
      compose(request);
    } else if (pick(0, 2) == 0) {
      draw_policy(request);
    }
    if (pick(0, 3) == 0) {
      for (int i = 0; i < 12; ++i) request.stop_token_ids.push_back(pick(1, kVocab - 1));
    }
    return request;
  }

  void draw_policy(Request& request) {
    ops::KeyPolicy& policy = request.key_policy;
    policy.rule = static_cast<ops::KeyRule>(pick(0, 5));
    const bool seals = backend_.format && quant::seals_keys(*backend_.format);
    if (seals && policy.rule == ops::KeyRule::summary) policy.rule = ops::KeyRule::window;  // it has no summaries
    if (policy.rule == ops::KeyRule::full) {
      request.keeps_kv = request.n > 1;
      return;
    }
    policy.window = one_of({1, pick(1, 30), pick(1, 200)});
    if (policy.rule != ops::KeyRule::summary) policy.prefix = one_of({0, 4, pick(0, 40)});
    policy.period = pick(1, 4) * (policy.rule == ops::KeyRule::strided ? 1 : kBlockTokens);
    if (policy.rule == ops::KeyRule::block) policy.keep = pick(0, policy.period / kBlockTokens) * kBlockTokens;
    if (policy.rule == ops::KeyRule::budget) policy.keep = pick(0, 4);
  }

  static int blocks_of(const Request& request) {
    int blocks = kv::BlockTable::blocks_for(static_cast<int>(request.prompt.size()) + request.max_tokens);
    if (request.key_policy.rule == ops::KeyRule::summary) blocks += 2;
    for (const ChunkSpan& chunk : request.chunks) {
      blocks += kv::BlockTable::blocks_for(chunk.count + static_cast<int>(chunk.anchor.size()));
    }
    return blocks;
  }

  EngineOptions draw_options() {
    EngineOptions options;
    options.kv_format = backend_.format;
    options.max_num_seqs = one_of({1, 3, 8, 16});
    options.max_batch_tokens = one_of({1, 7, 16, 33, 80, 512});
    if (options.max_batch_tokens == 1) options.max_batch_tokens = pick(1, 5);
    options.eos_ids = {0};
    options.enable_prefix_caching = pick(0, 3) > 0;
    const EngineStats stats = backend_.alone.stats();
    options.kv_cache_bytes = stats.kv_bytes / stats.blocks_total * 800;
    if (tight_) {
      int needed = 0;
      int largest = 0;
      for (const Request& request : wanted_) {
        needed += request.n * blocks_of(request);
        largest = std::max(largest, blocks_of(request));
      }
      options.kv_cache_bytes = stats.kv_bytes / stats.blocks_total * std::max(needed / 5, largest);
      options.max_num_seqs = std::max(options.max_num_seqs, 8);
    }
    return options;
  }

  void speculate(EngineOptions& options) {
    SpeculativeOptions& speculative = options.speculative.emplace();
    speculative.num_draft_tokens = one_of({1, 2, 4, 7, 20});
    speculative.adaptive = pick(0, 4) == 0;
    if (pick(0, 3) == 0) return;  // by its own texts, in which little repeats
    if (pick(0, 2) == 0) {
      speculative.method = SpeculativeMethod::draft;
      speculative.draft_model = backend_.draft.get();
      // As many blocks of both models.
      const quant::KvFormat format = *backend_.alone.options().kv_format;
      const std::int64_t block_bytes = backend_.alone.stats().block_bytes;
      const std::int64_t draft_bytes = DraftModel::kv_shape(*backend_.draft, format).block_bytes();
      options.kv_cache_bytes = options.kv_cache_bytes / block_bytes * (block_bytes + draft_bytes);
      return;
    }
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      if (pick(0, 9) == 0) wanted_[i].speculative = false;
      for (int choice = 0; choice < wanted_[i].n; ++choice) {
        foreseen_[{static_cast<RequestId>(i + 1), choice}] = expected(wanted_[i], choice).tokens;
      }
    }
    const unsigned seed = static_cast<unsigned>(pick(0, 1000));
    speculative.make_proposer = [this, seed, right = one_of({0.0, 0.5, 0.9, 1.0})] {
      return std::make_unique<Clairvoyant>(foreseen_, seed, right, kVocab);
    };
  }

  void serve(Engine& engine) {
    const int patience = pick(0, 1) * pick(1, 6);  // 0: all arrive at once
    std::size_t next = 0;
    for (int step = 0; next < wanted_.size() || engine.has_work(); ++step) {
      ASSERT_LT(step, 20'000);
      while (next < wanted_.size() && (patience == 0 || pick(0, patience) == 0)) {
        submitted_[engine.submit(wanted_[next])] = next;
        ++next;
      }
      if (!submitted_.empty() && pick(0, 120) == 0) {
        const RequestId id = static_cast<RequestId>(pick(1, static_cast<int>(submitted_.size())));
        cancelled_[id] = true;
        engine.cancel(id);
      }
      for (StepOutput& output : engine.step()) take(std::move(output));
      if (!is_sanitized()) engine.check_invariants();
    }
  }

  void take(StepOutput output) {
    Answer& answer = answers_[{output.request_id, output.choice}];
    EXPECT_EQ(answer.finish_reason, FinishReason::none) << "request " << output.request_id << " spoke after its end";
    answer.tokens.insert(answer.tokens.end(), output.token_ids.begin(), output.token_ids.end());
    answer.logprobs.insert(answer.logprobs.end(), output.logprobs.begin(), output.logprobs.end());
    answer.finish_reason = output.finish_reason;
    answer.prompt_logprobs = std::move(output.prompt_logprobs);
    answer.error = output.error;
  }

  /// The oracle.
  Answer expected(const Request& request, int choice) {
    Request single = request;
    single.n = 1;
    single.sampling.choice_index += static_cast<std::uint32_t>(choice);
    if (choice > 0) single.prompt_logprobs.reset();
    single.speculative.reset();
    const Answer answer = answer_one(backend_.alone, single);
    remove_chunks(backend_.alone);
    return answer;
  }

  void compare(RequestId id, const Request& request, Totals& totals) {
    for (int choice = 0; choice < request.n; ++choice) {
      SCOPED_TRACE(concat("request ", id, ", choice ", choice, ", prompt of ", request.prompt.size()));
      const Answer& answer = answers_[{id, choice}];
      const Answer wanted = expected(request, choice);
      if (answer.finish_reason == FinishReason::abort) {
        EXPECT_TRUE(cancelled_[id]);
        ++totals.aborted;
        ASSERT_LE(answer.tokens.size(), wanted.tokens.size());
        EXPECT_TRUE(std::equal(answer.tokens.begin(), answer.tokens.end(), wanted.tokens.begin()));
        continue;
      }
      if (answer.finish_reason == FinishReason::error) {
        EXPECT_TRUE(tight_ && !request.chunks.empty() && answer.error.find("no room") != std::string::npos)
            << answer.error;
        ++totals.no_room;
        continue;
      }
      ++(answer.finish_reason == FinishReason::stop ? totals.stopped : totals.completed);
      if (!request.chunks.empty()) ++totals.composed;
      if (request.key_policy.rule != ops::KeyRule::full) ++totals.lossy;
      EXPECT_EQ(answer.finish_reason, wanted.finish_reason);
      EXPECT_EQ(answer.tokens, wanted.tokens);
      EXPECT_TRUE(same_bits(answer.logprobs, wanted.logprobs));
      EXPECT_TRUE(same_bits(answer.prompt_logprobs, wanted.prompt_logprobs));
    }
  }

  Backend& backend_;
  std::mt19937 random_;
  bool tight_;         // the pool has a fifth of what all answers need
  bool long_answers_;  // behind short prompts, so that sequences outgrow what they were admitted with
  std::vector<Request> wanted_;
  Foreseen foreseen_;
  std::map<RequestId, std::size_t> submitted_;
  std::map<RequestId, bool> cancelled_;
  std::map<std::pair<RequestId, int>, Answer> answers_;
};

// The reference backend is slow on purpose and takes part in one run of twenty.
void expect_answers_alone(std::optional<quant::KvFormat> format, unsigned num_seeds) {
  if (is_full()) num_seeds *= 20;
  std::map<std::string, Backend> backends;
  std::vector<std::string> fast;
  for (const std::string& name : ops::available_backends()) {
    backends.try_emplace(name, name, format);
    if (name != "reference") fast.push_back(name);
  }
  Totals totals;
  for (unsigned seed = 0; seed < num_seeds && !::testing::Test::HasFailure(); ++seed) {
    const std::string& name = seed % 20 == 7 || fast.empty() ? "reference" : fast[seed % fast.size()];
    SCOPED_TRACE(concat("seed ", seed, " on ", name));
    RandomEngineRun(backends.at(name), seed).run(totals);
  }
  if (::testing::Test::HasFailure()) return;
  EXPECT_GT(totals.tight_runs, num_seeds / 2);
  EXPECT_GT(totals.preemptions, num_seeds / 4);
  EXPECT_GT(totals.prefix_hit_tokens, 20 * num_seeds);
  EXPECT_GT(totals.forked_tokens, 10 * num_seeds);
  EXPECT_GT(totals.completed, 4 * num_seeds);
  EXPECT_GT(totals.stopped, num_seeds / 4);
  EXPECT_GT(totals.aborted, num_seeds / 10);
  EXPECT_GT(totals.composed, num_seeds);
  EXPECT_GT(totals.chunk_hits, num_seeds / 2);
  EXPECT_GT(totals.measured, 10 * num_seeds);
  EXPECT_GT(totals.evictions, num_seeds / 10);
  EXPECT_LT(totals.no_room, num_seeds);
  EXPECT_GT(totals.lossy, num_seeds / 2);
  EXPECT_GT(totals.drafted, 40 * num_seeds);
  EXPECT_GT(totals.accepted, totals.drafted / 20);
  EXPECT_LT(totals.accepted, totals.drafted * 9 / 10);
}

TEST(Equivalence, EveryAnswerIsThatOfTheRequestAlone) { expect_answers_alone({}, is_reduced() ? 8 : 150); }

// What a sequence has in open cells depends on slices, forks and preemption; what it reads does not.
TEST(Equivalence, EveryAnswerIsThatOfTheRequestAloneWithSealedKeys) {
  expect_answers_alone(quant::KvFormat::int4, is_reduced() ? 8 : 75);
}

}  // namespace
}  // namespace nb::engine
