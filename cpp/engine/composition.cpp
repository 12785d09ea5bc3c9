#include "engine/composition.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"

namespace nb::engine {

namespace {

void hide(PlacedChunk& chunk, int position) {
  const int key = chunk.anchor_len + position - chunk.begin;
  chunk.hidden.resize((static_cast<std::size_t>(chunk.anchor_len + chunk.count) + kBlockTokens - 1) / kBlockTokens);
  chunk.hidden[static_cast<std::size_t>(key / kBlockTokens)] |= static_cast<std::uint16_t>(1 << key % kBlockTokens);
}

int share_of(double ratio, int count) { return static_cast<int>(std::ceil(ratio * count - 1e-9)); }

}  // namespace

std::unique_ptr<Composition> Composition::create(const Request& request) {
  const Reuse& reuse = request.reuse;
  if (!wants_composition(request)) return nullptr;
  const int num_prompt = static_cast<int>(request.prompt.size());
  std::unique_ptr<Composition> made(new Composition());
  made->mode_ = reuse.mode;
  for (std::size_t i = 0; i < request.chunks.size(); ++i) {
    const ChunkSpan& span = request.chunks[i];
    if (span.begin == 0 && span.anchor.empty()) continue;
    PlacedChunk chunk{.span = static_cast<int>(i),
                      .begin = span.begin,
                      .count = std::min(span.count, num_prompt - 1 - span.begin),
                      .anchor_len = static_cast<int>(span.anchor.size())};
    // Of a single token that is hidden nothing would be left: it is computed with the rest.
    const bool masks = reuse.mask_sink && chunk.begin > 0;
    if (chunk.count == 0 || (chunk.count == 1 && masks)) continue;
    made->num_chunk_tokens_ += chunk.count;
    if (masks) hide(chunk, chunk.begin);
    made->chunks_.push_back(std::move(chunk));
  }
  if (made->chunks_.empty()) return nullptr;
  int position = 0;
  for (const PlacedChunk& chunk : made->chunks_) {
    for (; position < chunk.begin; ++position) made->positions_.push_back(position);
    position = chunk.end();
  }
  for (; position < num_prompt; ++position) made->positions_.push_back(position);
  made->num_plain_ = num_prompt - made->num_chunk_tokens_;
  if (reuse.mode != ReuseMode::blend) return made;
  if (reuse.selection == BlendSelection::deviation) {
    made->num_recomputed_ = share_of(reuse.ratio, made->num_chunk_tokens_);
    made->deviations_.resize(static_cast<std::size_t>(made->num_chunk_tokens_));
    return made;
  }
  std::vector<std::int32_t> chosen;
  for (const PlacedChunk& chunk : made->chunks_) {
    for (int i = 0; i < share_of(reuse.ratio, chunk.count); ++i) chosen.push_back(chunk.begin + i);
  }
  made->recompute(std::move(chosen));
  return made;
}

int Composition::chunk_position(int number) const {
  for (const PlacedChunk& chunk : chunks_) {
    if (number < chunk.count) return chunk.begin + number;
    number -= chunk.count;
  }
  NB_CHECK(false, internal, "token ", number, " behind the last chunk");
}

void Composition::measured(int count) {
  NB_ASSERT(count > 0 && num_measured_ + count <= static_cast<int>(deviations_.size()));
  num_measured_ += count;
  if (selecting()) return;
  std::vector<std::int32_t> order(deviations_.size());
  std::iota(order.begin(), order.end(), 0);
  const auto larger = [&](std::int32_t a, std::int32_t b) {
    const float x = deviations_[static_cast<std::size_t>(a)], y = deviations_[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  const auto end = order.begin() + num_recomputed_;
  std::partial_sort(order.begin(), end, order.end(), larger);
  std::vector<std::int32_t> chosen;
  std::for_each(order.begin(), end, [&](std::int32_t number) { chosen.push_back(chunk_position(number)); });
  recompute(std::move(chosen));
}

void Composition::restart() {
  if (selecting()) num_measured_ = 0;
}

/// Makes tokens of chunks own ones, which nobody sees in their chunks any more.
void Composition::recompute(std::vector<std::int32_t> chosen) {
  std::sort(chosen.begin(), chosen.end());
  for (const std::int32_t position : chosen) {
    const auto holds = [&](const PlacedChunk& chunk) { return position >= chunk.begin && position < chunk.end(); };
    hide(*std::find_if(chunks_.begin(), chunks_.end(), holds), position);
  }
  num_recomputed_ = static_cast<int>(chosen.size());
  std::vector<std::int32_t> all(positions_.size() + chosen.size());
  std::merge(positions_.begin(), positions_.end(), chosen.begin(), chosen.end(), all.begin());
  positions_ = std::move(all);
}

}  // namespace nb::engine
