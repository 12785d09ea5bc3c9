#include "engine/batch_builder.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "engine/prompt_scores.h"

namespace nb::engine {

namespace {

void add_rows(const PlannedSequence& entry, int entry_index, StepBatch& batch) {
  const Sequence& sequence = *entry.sequence;
  model::StepInputs& inputs = batch.inputs;
  for (int own = entry.first; own < entry.first + entry.count; ++own) {
    const int position = sequence.position_of(own);
    const int draft = position + 1 - sequence.len();
    const bool samples = entry.samples && draft >= 0;
    const bool scores = wants_prompt_score(sequence, position);
    if (samples || scores) {
      inputs.logit_rows.push_back(inputs.num_tokens());
      batch.logit_uses.push_back({.entry = entry_index,
                                  .position = position,
                                  .draft = std::max(0, draft),
                                  .samples = samples,
                                  .scores = scores});
    }
    add_row(sequence, position, position, sequence.table.slot_of(own), inputs);  // rotated to its place
  }
  if (!sequence.open.is_there()) return;
  // Nobody but who computes a chunk is ever in its last group.
  const bool seals_rest = sequence.is_internal() && entry.first + entry.count == sequence.own_len();
  add_open_rows(sequence, entry.first, entry.count, seals_rest, inputs);
}

/// What the rows see of the sequence's keys, unless it is all; and the run of summaries that stand for the others.
void add_policy(const PlannedSequence& entry, ops::AttentionSegment& segment, model::StepInputs& inputs) {
  const Sequence& sequence = *entry.sequence;
  const ops::KeyPolicy& policy = sequence.request.key_policy;
  if (entry.first + entry.count <= ops::exact_tokens(policy)) return;
  segment.policy = static_cast<std::int32_t>(inputs.policies.size());
  inputs.policies.push_back(policy);
  const int num_summaries = sequence.summaries.length();
  if (num_summaries == 0) return;
  // A row sees a summary from where it does not see the group.
  inputs.runs.push_back({.block_begin = static_cast<std::int32_t>(inputs.blocks.size()),
                         .num_keys = num_summaries,
                         .position_offset = 0,
                         .positions_begin = static_cast<std::int32_t>(inputs.run_positions.size()),
                         .score_bias = std::log(static_cast<float>(policy.period))});
  for (int group = 0; group < num_summaries; ++group) {
    inputs.run_positions.push_back((group + 1) * policy.period - 1 + policy.window);
  }
  const auto blocks = sequence.summaries.blocks();
  inputs.blocks.insert(inputs.blocks.end(), blocks.begin(), blocks.end());
  const auto own_blocks = static_cast<std::int32_t>(inputs.blocks.size());  // where the next run's are
  for (int group = entry.first_summary; group < num_summaries; ++group) {
    const int begin = group * policy.period;
    inputs.summaries.push_back({.block_begin = own_blocks,
                                .first_key = begin,
                                .num_tokens = policy.period,
                                .position = begin,
                                .slot = sequence.summaries.slot_of(group),
                                .slot_position = begin + policy.period / 2});
  }
}

}  // namespace

void add_own_run(const Sequence& sequence, int num_keys, model::StepInputs& inputs) {
  const auto blocks = sequence.table.blocks().first(static_cast<std::size_t>(kv::BlockTable::blocks_for(num_keys)));
  ops::AttentionRun run{
      .block_begin = static_cast<std::int32_t>(inputs.blocks.size()), .num_keys = num_keys, .position_offset = 0};
  if (sequence.composition) {
    run.positions_begin = static_cast<std::int32_t>(inputs.run_positions.size());
    for (int own = 0; own < num_keys; ++own) inputs.run_positions.push_back(sequence.position_of(own));
  }
  inputs.runs.push_back(run);
  const auto first = inputs.blocks.insert(inputs.blocks.end(), blocks.begin(), blocks.end());
  // Nobody sees the keys of a hole; any block that may be read stands in for it.
  if (sequence.table.num_holes() > 0) std::replace(first, inputs.blocks.end(), kNoBlock, blocks.back());
}

void add_chunk_run(const PlacedChunk& chunk, std::span<const BlockId> blocks, bool hides, model::StepInputs& inputs) {
  ops::AttentionRun run{.block_begin = static_cast<std::int32_t>(inputs.blocks.size()),
                        .num_keys = chunk.anchor_len + chunk.count,
                        .position_offset = chunk.begin - chunk.anchor_len,
                        .first_key = chunk.anchor_len};
  if (hides && !chunk.hidden.empty()) {
    run.hidden_begin = static_cast<std::int32_t>(inputs.hidden.size());
    inputs.hidden.insert(inputs.hidden.end(), chunk.hidden.begin(), chunk.hidden.end());
  }
  inputs.runs.push_back(run);
  const auto used = blocks.first(static_cast<std::size_t>(kv::BlockTable::blocks_for(run.num_keys)));
  inputs.blocks.insert(inputs.blocks.end(), used.begin(), used.end());
}

void add_row(const Sequence& sequence, int position, int key_position, int slot, model::StepInputs& inputs) {
  inputs.token_ids.push_back(sequence.token_at(position));
  inputs.positions.push_back(position);
  inputs.key_positions.push_back(key_position);
  inputs.slots.push_back(slot);
}

void StepBatch::reserve(int max_tokens, int max_sequences, int max_blocks) {
  inputs.reserve(max_tokens, max_sequences, max_blocks);
  logit_uses.reserve(static_cast<std::size_t>(max_tokens));
}

void build_batch(const StepPlan& plan, const kv::ChunkStore& chunks, StepBatch& batch) {
  batch.inputs.clear();
  batch.logit_uses.clear();
  model::StepInputs& inputs = batch.inputs;
  for (std::size_t i = 0; i < plan.entries.size(); ++i) {
    const PlannedSequence& entry = plan.entries[i];
    if (entry.selects) continue;
    ops::AttentionSegment segment{.row_begin = inputs.num_tokens(),
                                  .row_count = entry.count,
                                  .run_begin = static_cast<std::int32_t>(inputs.runs.size()),
                                  .run_count = 0};
    add_rows(entry, static_cast<int>(i), batch);
    if (entry.sequence->composition) {
      for (const PlacedChunk& chunk : entry.sequence->composition->chunks()) {
        // No row sees a chunk behind it.
        if (chunk.begin < inputs.positions.back()) add_chunk_run(chunk, chunks.get(chunk.id).blocks, true, inputs);
      }
    }
    add_policy(entry, segment, inputs);
    add_own_run(*entry.sequence, entry.first + entry.count, inputs);
    segment.run_count = static_cast<std::int32_t>(inputs.runs.size()) - segment.run_begin;
    inputs.segments.push_back(segment);
  }
  NB_ASSERT(batch.inputs.num_tokens() == plan.num_tokens);
}

}  // namespace nb::engine
