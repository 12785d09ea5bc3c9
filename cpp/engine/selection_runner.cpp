#include "engine/selection_runner.h"

#include <algorithm>

#include "base/error.h"
#include "engine/batch_builder.h"
#include "engine/open_groups.h"
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
    const int cells = quant::seals_keys(shape.format) ? blocks : 0;
    scratch_ = std::make_unique<kv::KvStorage>(shape, blocks, model_.memory(), cells);
  }
  if (composition.num_measured() == 0) store_plain(sequence, storage, entry.count, ctx);

  const bool seals = quant::seals_keys(storage.shape().format);
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
      if (seals) {
        inputs_.open_cells.push_back(inputs_.num_tokens() / kBlockTokens);  // of the scratch
        inputs_.open_groups.push_back(-1);                                  // and all that is seen is sealed
      }
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
  ops::OpenKeys open = scratch_->open_layer(kMeasuredLayer);
  open.row_cells = inputs_.open_cells.data();
  ops::key_deviation(out, scratch_->layer(kMeasuredLayer), inputs_.slots, storage.layer(kMeasuredLayer), stored_slots_,
                     ctx, open);
}

/// Keys and values of the first layer for plain tokens behind the lead that tokens of chunks see.
void SelectionRunner::store_plain(const Sequence& sequence, const kv::KvStorage& storage, int max_rows,
                                  ops::ExecContext& ctx) {
  const Composition& composition = *sequence.composition;
  const auto plain = composition.positions();
  int own = composition.lead_len();
  // Groups are sealed as a whole; what the lead has of the first one is in the sequence's open cell.
  const bool seals = quant::seals_keys(storage.shape().format);
  if (seals) max_rows = std::max(max_rows, kBlockTokens);
  while (own < static_cast<int>(plain.size()) && plain[static_cast<std::size_t>(own)] < composition.tail_begin()) {
    ctx.workspace->reset();
    inputs_.clear();
    const int begin = own;
    const int most = seals ? (own + max_rows) / kBlockTokens * kBlockTokens - own : max_rows;
    for (; own < static_cast<int>(plain.size()) && inputs_.num_tokens() < most; ++own) {
      const int position = plain[static_cast<std::size_t>(own)];
      if (position >= composition.tail_begin()) break;
      add_row(sequence, position, position, sequence.table.slot_of(own), inputs_);
    }
    if (seals) add_open_rows(sequence, begin, own - begin, /*seals_rest=*/true, inputs_);
    Tensor hidden = model_.decoder().embed(inputs_, ctx);
    model_.decoder().store_kv(hidden, 0, inputs_, storage, ctx);
  }
}

}  // namespace nb::engine
