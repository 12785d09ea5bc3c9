// Everything one forward step needs: which tokens, where they stand, where their KV goes, what they attend to.
//
// Written by engine/batch_builder, read by model/decoder. Arrays keep their capacity, so a warm step allocates
// nothing. There is no prefill flag: a prompt slice, a decode and a verify differ only in their row counts.
#pragma once

#include <cstdint>
#include <vector>

#include "base/ids.h"
#include "ops/ops.h"

namespace nb::model {

struct StepInputs {
  // One entry per row (token), rows of a sequence consecutive and in position order.
  std::vector<TokenId> token_ids;
  std::vector<std::int32_t> positions;      ///< position in the sequence; rotates the query
  std::vector<std::int32_t> key_positions;  ///< position in the run the key is stored for; rotates the key
  std::vector<std::int32_t> slots;          ///< block * kBlockTokens + index: where the row's KV goes

  // Attention in CSR form: segment -> runs -> blocks. A run includes the keys this step writes. Segments come in any
  // order of their rows; engine/cascade_plan puts those side by side that share leading blocks.
  std::vector<ops::AttentionSegment> segments;
  std::vector<ops::AttentionRun> runs;
  std::vector<std::int32_t> blocks;
  std::vector<std::int32_t> run_positions;  ///< AttentionArgs::key_positions
  std::vector<std::uint16_t> hidden;        ///< AttentionArgs::hidden
  std::vector<ops::KeyPolicy> policies;     ///< AttentionArgs::policies

  /// Groups that become summaries in this step, of `blocks`: in each layer once the step's keys are there and before
  /// its rows attend. The slots are not among `slots`.
  std::vector<ops::KvSummary> summaries;

  // Only of KV formats that seal: see ops::OpenKeys.
  std::vector<std::int32_t> open_cells;   ///< one entry per row
  std::vector<std::int32_t> open_groups;  ///< likewise
  std::vector<ops::SealItem> seals;       ///< what is sealed, in every layer, before rows attend
  int num_step_cells = 0;                 ///< cells ~0, ~1, ... that do not outlive the step

  /// Rows whose logits are needed, ascending.
  std::vector<std::int32_t> logit_rows;

  int num_tokens() const { return static_cast<int>(token_ids.size()); }

  /// Makes room, so that steps within these limits never allocate.
  void reserve(int max_tokens, int max_sequences, int max_blocks) {
    const auto tokens = static_cast<std::size_t>(max_tokens);
    for (auto* array : {&token_ids, &positions, &key_positions, &slots, &logit_rows, &open_cells, &open_groups}) {
      array->reserve(tokens);
    }
    seals.reserve(tokens / kBlockTokens + static_cast<std::size_t>(max_sequences));
    segments.reserve(static_cast<std::size_t>(max_sequences));
    runs.reserve(static_cast<std::size_t>(max_sequences));
    policies.reserve(static_cast<std::size_t>(max_sequences));
    blocks.reserve(static_cast<std::size_t>(max_blocks));
  }

  void clear() {
    for (auto* array :
         {&token_ids, &positions, &key_positions, &slots, &logit_rows, &blocks, &open_cells, &open_groups}) {
      array->clear();
    }
    seals.clear();
    num_step_cells = 0;
    segments.clear();
    runs.clear();
    run_positions.clear();
    hidden.clear();
    policies.clear();
    summaries.clear();
  }
};

inline ops::AttentionPlan plan_of(const StepInputs& inputs) {
  return {inputs.positions,     inputs.segments, inputs.runs,    inputs.blocks,
          inputs.run_positions, inputs.hidden,   inputs.policies};
}

}  // namespace nb::model
