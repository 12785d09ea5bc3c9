// How one sequence is put together from chunks: which of its tokens it computes itself, where the chunks stand, and
// which of their keys it does not see.
//
//   prompt:   [lead .....][chunk A ........][plain ..][chunk B .....][plain ...] output
//   own:      0 .. lead-1        * *        plain          *          plain       output     (* computed again)
//
// Own tokens are numbered in position order; number i lives in slot i of the sequence's block table. Those before the
// first chunk, the lead, are as in any other sequence, so their KV is exact; all behind are not. In the mode `blend` by
// deviation the tokens that are computed again are not known at first: a pass over the first layer measures them (see
// selection_runner.h), and until then the own tokens are the plain ones. Integers only. Used by the thread that runs
// steps.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "engine/request.h"
#include "kv/chunk_store.h"

namespace nb::engine {

/// A chunk in a sequence.
struct PlacedChunk {
  int span = 0;        ///< index in Request::chunks
  kv::ChunkId id = 0;  ///< set by the scheduler
  int begin = 0;       ///< position of its first token
  int count = 0;       ///< tokens that are used: all, or all but the prompt's last token
  int anchor_len = 0;
  std::vector<std::uint16_t> hidden{};  ///< bit i % 16 of element i / 16: key i, counted from the anchor, is not seen

  int end() const { return begin + count; }
};

class Composition {
 public:
  /// Of a valid request whose mode is not `exact`; none if no chunk would be used: the prompt has none, or only one
  /// without an anchor at its beginning, whose KV is exact there; or all chunks would be computed again; or hiding
  /// their first tokens (Reuse::mask_sink) would leave nothing of them.
  static std::unique_ptr<Composition> create(const Request& request);

  ReuseMode mode() const { return mode_; }
  std::span<PlacedChunk> chunks() { return chunks_; }
  std::span<const PlacedChunk> chunks() const { return chunks_; }

  /// Tokens before the first chunk.
  int lead_len() const { return chunks_.front().begin; }
  /// Position behind the last chunk's tokens.
  int tail_begin() const { return chunks_.back().end(); }
  /// Tokens of the prompt that the sequence computes: plain ones and those computed again.
  int num_own() const { return num_plain_ + num_recomputed_; }
  int num_plain() const { return num_plain_; }
  int num_recomputed() const { return num_recomputed_; }
  int num_chunk_tokens() const { return num_chunk_tokens_; }

  /// Positions of the own tokens of the prompt, ascending; of the plain ones alone while selecting().
  std::span<const std::int32_t> positions() const { return positions_; }

  // ---- which tokens to compute again ----

  /// Whether deviations are still to be measured.
  bool selecting() const { return num_measured_ < static_cast<int>(deviations_.size()); }
  /// Tokens of chunks, in order, whose deviation is known.
  int num_measured() const { return num_measured_; }
  /// Position of a token of chunks by its number.
  int chunk_position(int number) const;
  /// Where the measuring writes: one value per token of chunks.
  std::span<float> deviations() { return deviations_; }
  /// `count` more are known; with the last one the tokens are chosen.
  void measured(int count);
  /// Deviations must be measured again, unless they all are known.
  void restart();

 private:
  Composition() = default;
  void recompute(std::vector<std::int32_t> chosen);

  ReuseMode mode_ = ReuseMode::isolated;
  std::vector<PlacedChunk> chunks_;
  int num_plain_ = 0;
  int num_recomputed_ = 0;
  int num_chunk_tokens_ = 0;
  std::vector<std::int32_t> positions_;
  std::vector<float> deviations_;  // empty where nothing is measured
  int num_measured_ = 0;
};

}  // namespace nb::engine
