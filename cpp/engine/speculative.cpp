#include "engine/speculative.h"

#include <algorithm>

#include "base/error.h"
#include "engine/ngram_proposer.h"
#include "engine/suffix_proposer.h"
#include "sampling/accept.h"

namespace nb::engine {

namespace {

/// Of one sequence.
struct Memory final : DraftState {
  Acceptance acceptance;
  std::unique_ptr<DraftState> of_proposer;
};

Memory& memory_of(Sequence& sequence) {
  if (sequence.draft_state == nullptr) sequence.draft_state = std::make_unique<Memory>();
  return static_cast<Memory&>(*sequence.draft_state);
}

std::unique_ptr<Proposer> make_proposer(const SpeculativeOptions& options) {
  if (options.make_proposer) return options.make_proposer();
  if (options.method == SpeculativeMethod::suffix) return std::make_unique<SuffixProposer>(options.prompt_lookup_min);
  return std::make_unique<NgramProposer>(options.prompt_lookup_min, options.prompt_lookup_max);
}

/// In place of what was seen before, of which a draft model says nothing.
constexpr int kDraftModelEvidence = 8;

}  // namespace

SpeculativeMethod parse_speculative_method(const std::string& name) {
  if (name == "ngram") return SpeculativeMethod::ngram;
  if (name == "suffix") return SpeculativeMethod::suffix;
  NB_CHECK(name == "draft", invalid_argument, "the method of speculation must be ngram, suffix or draft, got '", name,
           "'");
  return SpeculativeMethod::draft;
}

void validate(const SpeculativeOptions& options) {
  NB_CHECK(options.num_draft_tokens >= 1 && options.num_draft_tokens <= kMostDraftTokens, invalid_argument,
           "num_draft_tokens must be in [1, ", kMostDraftTokens, "], got ", options.num_draft_tokens);
  NB_CHECK(options.prompt_lookup_min >= 1, invalid_argument, "prompt_lookup_min must be >= 1, got ",
           options.prompt_lookup_min);
  NB_CHECK(options.prompt_lookup_max >= options.prompt_lookup_min, invalid_argument,
           "prompt_lookup_max must be >= prompt_lookup_min (", options.prompt_lookup_min, "), got ",
           options.prompt_lookup_max);
  const bool drafts = options.method == SpeculativeMethod::draft;
  NB_CHECK(drafts == (options.draft_model != nullptr), invalid_argument,
           drafts ? "the method draft needs a draft_model" : "a draft_model is of the method draft alone");
}

Speculator::Speculator(const SpeculativeOptions& options, int vocab_size, std::unique_ptr<DraftModel> draft_model)
    : options_(options), vocab_size_(vocab_size), draft_model_(std::move(draft_model)) {
  validate(options);
  NB_ASSERT((options.method == SpeculativeMethod::draft) == (draft_model_ != nullptr));
  if (draft_model_ == nullptr) proposer_ = make_proposer(options);
}

DraftCounters Speculator::counters() const {
  DraftCounters counters = counters_;
  if (draft_model_ != nullptr) {
    counters.model_seconds = draft_model_->seconds();
    counters.model_tokens = draft_model_->num_read();
    counters.model_kv_bytes = draft_model_->kv_bytes();
  }
  return counters;
}

void Speculator::restored(std::span<const BlockId> blocks) {
  if (draft_model_ == nullptr) return;
  for (const BlockId block : blocks) draft_model_->cleared(block);
}

void Speculator::propose(std::span<const DraftCandidate> candidates, DraftRoom room) {
  num_guesses_ = 0;
  draft_seconds_ = 0.0;
  for (const DraftCandidate& candidate : candidates) {
    if (draft_model_ == nullptr) {
      look_up(candidate);
    } else {
      consider(candidate);
    }
  }
  if (num_guesses_ == 0) return;
  choose(room);
  if (draft_model_ != nullptr) {
    make_drafts();
    return;
  }
  for (std::size_t i = 0; i < num_guesses_; ++i) {
    const auto end = guesses_[i].tokens.begin() + counts_[i];
    guesses_[i].sequence->drafts.assign(guesses_[i].tokens.begin(), end);
  }
}

Speculator::Guess& Speculator::add_guess(const DraftCandidate& candidate) {
  if (guesses_.size() == num_guesses_) guesses_.emplace_back();
  Guess& guess = guesses_[num_guesses_];
  guess.sequence = candidate.sequence;
  guess.tokens.clear();
  guess.chances.clear();
  return guess;
}

/// Notes what the proposer says about a sequence, unless that is nothing.
void Speculator::look_up(const DraftCandidate& candidate) {
  Guess& guess = add_guess(candidate);
  Memory& memory = memory_of(*candidate.sequence);
  const int most = std::min(candidate.most, options_.num_draft_tokens);
  guess.evidence = proposer_->propose(*candidate.sequence, memory.of_proposer, most, guess.tokens);
  NB_ASSERT(static_cast<int>(guess.tokens.size()) <= most);
  const auto is_outside = [&](TokenId token) { return token < 0 || token >= vocab_size_; };
  NB_ASSERT(std::none_of(guess.tokens.begin(), guess.tokens.end(), is_outside));
  if (guess.tokens.empty()) return;
  for (int i = 0; i < static_cast<int>(guess.tokens.size()); ++i) {
    guess.chances.push_back(memory.acceptance.estimate(guess.evidence + i, &acceptance_));
  }
  ++num_guesses_;
}

/// Notes what guesses of the draft model about a sequence would be worth, before any are made.
void Speculator::consider(const DraftCandidate& candidate) {
  const int most = std::min(candidate.most, options_.num_draft_tokens);
  if (!draft_model_->can_guess(*candidate.sequence, most)) return;
  Guess& guess = add_guess(candidate);
  guess.evidence = kDraftModelEvidence;
  guess.evidence_grows = 0;
  const double chance = memory_of(*candidate.sequence).acceptance.estimate(guess.evidence, &acceptance_);
  guess.chances.assign(static_cast<std::size_t>(most), chance);
  ++num_guesses_;
}

/// Has the draft model guess as many as were chosen.
void Speculator::make_drafts() {
  wishes_.clear();
  for (std::size_t i = 0; i < num_guesses_; ++i) {
    if (counts_[i] > 0) wishes_.push_back({.sequence = guesses_[i].sequence, .count = counts_[i]});
  }
  if (wishes_.empty()) return;
  const double before = draft_model_->seconds();
  draft_model_->guess(wishes_, [this](int rows, double seconds) { draft_costs_.record(rows, seconds); });
  draft_seconds_ = draft_model_->seconds() - before;
  for (std::size_t i = 0; i < num_guesses_; ++i) {
    const auto& drafts = guesses_[i].sequence->drafts;
    guesses_[i].tokens.assign(drafts.begin(), drafts.end());
  }
}

/// How many of each guess are verified. Now and then all, or none, whatever seems to pay: what a step takes with them
/// and without, and how often a draft model is right, is known only from such steps.
void Speculator::choose(DraftRoom room) {
  counts_.assign(num_guesses_, 0);
  if (!options_.adaptive) {
    choose_all(room);
    return;
  }
  chances_.clear();
  for (std::size_t i = 0; i < num_guesses_; ++i) chances_.push_back(guesses_[i].chances);
  const StepCosts* const making = draft_model_ == nullptr ? nullptr : &draft_costs_;
  choose_counts(chances_, room.planned_rows, room.free_rows, costs_, counts_, making);
  const auto none = [&] { counts_.assign(num_guesses_, 0); };
  if (std::any_of(counts_.begin(), counts_.end(), [](int count) { return count > 0; })) {
    if (++num_choices_ % kPlainEvery == 0) none();
    return;
  }
  if (costs_.seconds(room.planned_rows) == 0.0) return;
  choose_all(room);
  if (seconds_since_probe_ * kProbeShare < extra_seconds(room.planned_rows)) {
    none();
  } else {
    seconds_since_probe_ = 0.0;
  }
}

void Speculator::choose_all(DraftRoom room) {
  int rows = room.free_rows;
  for (std::size_t i = 0; i < num_guesses_; ++i) {
    counts_[i] = std::min(rows, static_cast<int>(guesses_[i].chances.size()));
    rows -= counts_[i];
  }
}

/// What counts_ would add to a step, if nothing of them is right.
double Speculator::extra_seconds(int planned_rows) const {
  int num_drafts = 0, num_rounds = 0;
  for (const int count : counts_) {
    num_drafts += count;
    num_rounds = std::max(num_rounds, count);
  }
  double seconds = costs_.seconds(planned_rows + num_drafts) - costs_.seconds(planned_rows);
  for (int round = 0; draft_model_ != nullptr && round < num_rounds; ++round) {
    const auto takes_part = [&](int count) { return count > round; };
    seconds += draft_costs_.seconds(static_cast<int>(std::count_if(counts_.begin(), counts_.end(), takes_part)));
  }
  return seconds;
}

void Speculator::record(const StepPlan& plan, std::span<const TokenId> sampled, double seconds) {
  int num_decodes = 0, num_drafted = 0, num_accepted = 0;
  bool only_decodes = true;
  std::size_t next = 0;
  for (const PlannedSequence& entry : plan.entries) {
    const bool decodes = entry.decodes();
    only_decodes = only_decodes && decodes;
    if (!decodes) continue;
    ++num_decodes;
    const auto drawn =
        sampled.subspan(static_cast<std::size_t>(entry.first_draw), static_cast<std::size_t>(entry.num_draws()));
    num_drafted += entry.num_drafts;
    counters_.drafts += entry.num_drafts > 0 ? 1 : 0;
    const int num_right = sampling::count_accepted(entry.sequence->drafts, drawn);
    num_accepted += num_right;
    if (draft_model_ != nullptr && entry.num_drafts > 0) draft_model_->settle(*entry.sequence, num_right);
    if (next == num_guesses_ || guesses_[next].sequence != entry.sequence) continue;
    const Guess& guess = guesses_[next++];
    Memory& memory = memory_of(*entry.sequence);
    // What was guessed and not verified can be right or wrong all the same.
    for (std::size_t i = 0; i < std::min(guess.tokens.size(), drawn.size()); ++i) {
      if (drawn[i] == sampling::kNotDrawn) break;
      const bool right = guess.tokens[i] == drawn[i];
      const int evidence = guess.evidence + static_cast<int>(i) * guess.evidence_grows;
      memory.acceptance.record(evidence, right);
      acceptance_.record(evidence, right);
      if (!right) break;
    }
  }
  num_guesses_ = 0;
  seconds_since_probe_ += seconds + draft_seconds_;
  counters_.steps += num_decodes;
  counters_.drafted += num_drafted;
  counters_.accepted += num_accepted;
  if (!only_decodes || num_decodes == 0) return;
  costs_.record(plan.num_tokens, seconds);
  if (num_drafted == 0) return;
  const double plain = costs_.seconds(num_decodes);
  if (plain == 0.0) return;
  counters_.saved_seconds += plain * (1.0 + static_cast<double>(num_accepted) / num_decodes) - seconds - draft_seconds_;
}

}  // namespace nb::engine
