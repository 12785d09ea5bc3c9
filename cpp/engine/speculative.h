// Guesses coming tokens so that one step can verify several: how many drafts each sequence gets, and what came of them.
//
// A Proposer or a draft model guesses; how often such guesses have been right, and what a step of so many rows takes,
// decide how many of them are worth a row, or worth making (draft_worth.h). No token depends on any of it: see
// sampling/accept.h. Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "engine/draft_model.h"
#include "engine/draft_source.h"
#include "engine/draft_worth.h"
#include "engine/metrics.h"
#include "engine/scheduler.h"

namespace nb::engine {

/// Guesses how the text of a sequence goes on.
class Proposer {
 public:
  virtual ~Proposer() = default;

  /// Appends at most `most` tokens to `drafts`, which is empty, and returns how much speaks for them: the number of
  /// tokens before them that were seen before. `memory`: what it remembers of the sequence, its own affair.
  virtual int propose(const Sequence& sequence, std::unique_ptr<DraftState>& memory, int most,
                      std::vector<TokenId>& drafts) = 0;
};

enum class SpeculativeMethod : std::uint8_t {
  ngram,   ///< see NgramProposer
  suffix,  ///< see SuffixProposer
  draft,   ///< see DraftModel
};

/// Throws invalid_argument for a name that is none of "ngram", "suffix" and "draft".
SpeculativeMethod parse_speculative_method(const std::string& name);

struct SpeculativeOptions {
  SpeculativeMethod method = SpeculativeMethod::ngram;
  int num_draft_tokens = 4;   ///< at most, for a sequence and step
  int prompt_lookup_min = 1;  ///< of `ngram` and `suffix`: latest tokens of a text that must have occurred before
  int prompt_lookup_max = 4;  ///< of `ngram`: and that are compared
  bool adaptive = true;       ///< fewer drafts, or none, where they do not pay
  const model::Model* draft_model = nullptr;  ///< of `draft`: outlives the engine, and nobody else runs it
  std::function<std::unique_ptr<Proposer>()> make_proposer{};  ///< in place of the method's, for tests
};

/// Most drafts for a sequence and step.
inline constexpr int kMostDraftTokens = 64;

/// Throws invalid_argument naming field, value and range.
void validate(const SpeculativeOptions& options);

class Speculator final : public DraftSource {
 public:
  /// Throws as validate(). `draft_model`: of that method.
  Speculator(const SpeculativeOptions& options, int vocab_size, std::unique_ptr<DraftModel> draft_model = nullptr);

  int num_stored() const override { return draft_model_ == nullptr ? 0 : options_.num_draft_tokens; }
  void restored(std::span<const BlockId> blocks) override;
  void propose(std::span<const DraftCandidate> candidates, DraftRoom room) override;

  /// Learns from a step before it is committed: what was drawn, as for Scheduler::commit(), and what it took.
  void record(const StepPlan& plan, std::span<const TokenId> sampled, double seconds);

  DraftCounters counters() const;
  /// None: another method.
  DraftModel* draft_model() { return draft_model_.get(); }

 private:
  static constexpr int kPlainEvery = 64;            // steps with drafts, one has none
  static constexpr double kProbeShare = 1.0 / 128;  // of the time may go into drafts that seem not to pay

  struct Guess {
    Sequence* sequence = nullptr;
    std::vector<TokenId> tokens;
    int evidence = 0;        // of the first token
    int evidence_grows = 1;  // with each
    std::vector<double> chances;
  };

  Guess& add_guess(const DraftCandidate& candidate);
  void look_up(const DraftCandidate& candidate);
  void consider(const DraftCandidate& candidate);
  void make_drafts();
  void choose_all(DraftRoom room);
  double extra_seconds(int planned_rows) const;
  void choose(DraftRoom room);

  SpeculativeOptions options_;
  int vocab_size_;
  std::unique_ptr<Proposer> proposer_;       // none: the draft model
  std::unique_ptr<DraftModel> draft_model_;  // none: the proposer
  std::vector<Guess> guesses_;               // of the present step, the first num_guesses_ of them
  std::size_t num_guesses_ = 0;
  std::vector<DraftChances> chances_;
  std::vector<int> counts_;
  Acceptance acceptance_;  // of all sequences
  StepCosts costs_;
  StepCosts draft_costs_;
  std::vector<DraftWish> wishes_;
  double draft_seconds_ = 0.0;  // that guessing for the present step took
  int num_choices_ = 0;
  double seconds_since_probe_ = 0.0;
  DraftCounters counters_;
};

}  // namespace nb::engine
