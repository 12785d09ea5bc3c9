#include "engine/batch_builder.h"

#include "base/error.h"
#include "engine/prompt_scores.h"

namespace nb::engine {

namespace {

void add_rows(const PlannedSequence& entry, int entry_index, StepBatch& batch) {
  const Sequence& sequence = *entry.sequence;
  model::StepInputs& inputs = batch.inputs;
  for (int position = entry.first; position < entry.first + entry.count; ++position) {
    const bool samples = entry.samples && position + 1 == sequence.len();
    const bool scores = wants_prompt_score(sequence, position);
    if (samples || scores) {
      inputs.logit_rows.push_back(inputs.num_tokens());
      batch.logit_uses.push_back({.entry = entry_index, .position = position, .samples = samples, .scores = scores});
    }
    inputs.token_ids.push_back(sequence.tokens[static_cast<std::size_t>(position)]);
    inputs.positions.push_back(position);
    inputs.key_positions.push_back(position);  // the run starts at 0
    inputs.slots.push_back(sequence.table.slot_of(position));
  }
}

void add_run(const PlannedSequence& entry, int row_begin, model::StepInputs& inputs) {
  const int num_keys = entry.first + entry.count;
  const auto blocks =
      entry.sequence->table.blocks().first(static_cast<std::size_t>(kv::BlockTable::blocks_for(num_keys)));
  inputs.segments.push_back({.row_begin = row_begin,
                             .row_count = entry.count,
                             .run_begin = static_cast<std::int32_t>(inputs.runs.size()),
                             .run_count = 1});
  inputs.runs.push_back(
      {.block_begin = static_cast<std::int32_t>(inputs.blocks.size()), .num_keys = num_keys, .position_offset = 0});
  inputs.blocks.insert(inputs.blocks.end(), blocks.begin(), blocks.end());
}

}  // namespace

void StepBatch::reserve(int max_tokens, int max_sequences, int max_blocks) {
  inputs.reserve(max_tokens, max_sequences, max_blocks);
  logit_uses.reserve(static_cast<std::size_t>(max_tokens));
}

void build_batch(const StepPlan& plan, StepBatch& batch) {
  batch.inputs.clear();
  batch.logit_uses.clear();
  for (std::size_t i = 0; i < plan.entries.size(); ++i) {
    const int row_begin = batch.inputs.num_tokens();
    add_rows(plan.entries[i], static_cast<int>(i), batch);
    add_run(plan.entries[i], row_begin, batch.inputs);
  }
  NB_ASSERT(batch.inputs.num_tokens() == plan.num_tokens);
}

}  // namespace nb::engine
