#include "engine/selection_runner.h"

#include <algorithm>

#include "base/error.h"
#include "engine/batch_builder.h"
#include "kv/block_table.h"

namespace nb::engine {

namespace {

constexpr int kMeasuredLayer = 1;  // the first whose keys depend on other tokens

}  // namespace

void SelectionRunner::run(const PlannedSequence& entry, const kv::KvStorage& storage, const kv::ChunkStore& chunks,
                          ops::ExecContext& ctx) {
  const model::ModelConfig& config = model_.config();
  NB_CHECK(config.num_layers > kMeasuredLayer, unsupported,
           "blend by deviation compares keys of the second layer; this model has one layer");
  Sequence& sequence = *entry.sequence;
  Composition& composition = *sequence.composition;
  const int blocks = kv::BlockTable::blocks_for(entry.count);
  if (scratch_ == nullptr || scratch_->num_blocks() < blocks) {
    kv::KvShape shape = storage.shape();
    shape.num_layers = kMeasuredLayer + 1;
    scratch_ = std::make_unique<kv::KvStorage>(shape, blocks, model_.memory());
  }
  if (composition.num_measured() == 0) store_plain(sequence, storage, entry.count, ctx);

  ctx.workspace->reset();
  inputs_.clear();
  stored_slots_.clear();
  int number = composition.num_measured();
  const int end = number + entry.count;
  int first = 0;  // number of a chunk's first token
  for (const PlacedChunk& chunk : composition.chunks()) {
    const auto& stored = chunks.get(chunk.id).blocks;
    for (; number < std::min(end, first + chunk.count); ++number) {
      const int key = chunk.anchor_len + number - first;
      add_row(sequence, chunk.begin + number - first, key, inputs_.num_tokens(), inputs_);
      stored_slots_.push_back(stored[static_cast<std::size_t>(key / kBlockTokens)] * kBlockTokens + key % kBlockTokens);
    }
    first += chunk.count;
  }
  ops::AttentionSegment segment{.row_begin = 0, .row_count = inputs_.num_tokens(), .run_begin = 0, .run_count = 0};
  for (const PlacedChunk& chunk : composition.chunks()) {
    if (chunk.begin <= inputs_.positions.back()) {
      add_chunk_run(chunk, chunks.get(chunk.id).blocks, /*hides=*/false, inputs_);
    }
  }
  const auto plain = composition.positions();
  const auto behind = std::lower_bound(plain.begin(), plain.end(), inputs_.positions.back());
  // While tokens are chosen, the own ones are the plain ones.
  if (behind != plain.begin()) add_own_run(sequence, static_cast<int>(behind - plain.begin()), inputs_);
  segment.run_count = static_cast<std::int32_t>(inputs_.runs.size());
  inputs_.segments.push_back(segment);

  const model::Decoder& decoder = model_.decoder();
  Tensor hidden = decoder.embed(inputs_, ctx);
  decoder.run_layers(hidden, 0, kMeasuredLayer, inputs_, storage, ctx, {}, scratch_.get());
  decoder.store_kv(hidden, kMeasuredLayer, inputs_, *scratch_, ctx);
  const auto out = composition.deviations().subspan(static_cast<std::size_t>(composition.num_measured()),
                                                    static_cast<std::size_t>(entry.count));
  ops::key_deviation(out, scratch_->layer(kMeasuredLayer), inputs_.slots, storage.layer(kMeasuredLayer), stored_slots_,
                     ctx);
}

/// Keys and values of the first layer for plain tokens behind the lead that tokens of chunks see.
void SelectionRunner::store_plain(const Sequence& sequence, const kv::KvStorage& storage, int max_rows,
                                  ops::ExecContext& ctx) {
  const Composition& composition = *sequence.composition;
  const auto plain = composition.positions();
  int own = composition.lead_len();
  while (own < static_cast<int>(plain.size()) && plain[static_cast<std::size_t>(own)] < composition.tail_begin()) {
    ctx.workspace->reset();
    inputs_.clear();
    for (; own < static_cast<int>(plain.size()) && inputs_.num_tokens() < max_rows; ++own) {
      const int position = plain[static_cast<std::size_t>(own)];
      if (position >= composition.tail_begin()) break;
      add_row(sequence, position, position, sequence.table.slot_of(own), inputs_);
    }
    Tensor hidden = model_.decoder().embed(inputs_, ctx);
    model_.decoder().store_kv(hidden, 0, inputs_, storage, ctx);
  }
}

}  // namespace nb::engine
