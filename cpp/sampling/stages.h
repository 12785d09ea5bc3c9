// The ordered table of sampling stages: pure functions over a set of candidate tokens.
//
// Order: logit bias, bad words, allowed tokens, min_tokens, repetition penalty, presence and frequency penalty; then
// temperature, min-p, top-k, top-p, draw. Adding a stage is one function and one row of the table. Not for stopping
// rules. Safe from any thread with its own Candidates.
#pragma once

#include <cstdint>
#include <span>

#include "base/ids.h"
#include "sampling/candidates.h"
#include "sampling/params.h"

namespace nb::sampling {

/// What a stage may look at.
struct StageInput {
  const SamplingParams& params;
  std::span<const TokenId> tokens;                ///< prompt and output so far
  std::size_t num_prompt = 0;                     ///< how many of them are the prompt
  std::span<const TokenId> stop_ids{};            ///< tokens that would end the sequence
  std::span<const std::uint32_t> allowed_bits{};  ///< see SampleInput

  std::size_t num_generated() const { return tokens.size() - num_prompt; }
};

struct Stage {
  const char* name;
  bool edits;  ///< changes logits, at temperature 0 too; else it filters, after Candidates::settle()
  bool (*active)(const StageInput& input);
  void (*apply)(Candidates& candidates, const StageInput& input);
};

/// The table, in the order of application: those that edit, then those that filter.
std::span<const Stage> stages();

}  // namespace nb::sampling
