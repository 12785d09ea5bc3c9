// Guesses coming tokens with a second model that reads the same text: each guess is what that model would draw, with
// the random number of the token's place.
//
//   target:  [prompt ..............][answer ..][last]            a step: rows for last and the guesses
//   draft:   [prompt ..............][answer ..]                  before it: last -> g0 -> g1 -> ..., a row each
//
// Its keys and values lie in a storage of its own under the ids of the engine's blocks, so that it shares, forks and
// loses blocks as the sequences do; of each block it knows how many leading cells are filled. Prompts and chunks are
// read along with the target's steps; what is missing all the same (KV from disk, answers while nothing was guessed) is
// read before the next guess. Not for how many tokens are worth a guess (speculative.h). No token depends on it. Idea:
// Leviathan et al. 2023, Chen et al. 2023. Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <span>
#include <vector>

#include "engine/batch_builder.h"
#include "engine/scheduler.h"
#include "kv/chunk_store.h"
#include "kv/kv_storage.h"
#include "model/model.h"
#include "sampling/sampler.h"
#include "tensor/workspace.h"

namespace nb::engine {

/// How many tokens of a sequence are to be guessed.
struct DraftWish {
  Sequence* sequence;
  int count;  ///< at least 1; its blocks are in use so far
};

class DraftModel {
 public:
  /// What of the engine it works with; references must outlive it.
  struct Parts {
    const model::Model& model;     ///< guesses
    const model::Model& target;    ///< is guessed for, and lends its threads
    const kv::ChunkStore& chunks;  ///< that sequences are composed of
    quant::KvFormat target_format;
    int num_blocks;                       ///< of the engine
    int max_batch_tokens;                 ///< rows that it reads at a time, and before one step's guesses
    std::function<void()> follow_blocks;  ///< has copied(), cleared() and freed() called for what happened to blocks
  };
  explicit DraftModel(Parts parts);

  /// Throws unsupported unless `draft` can guess for `target`: both on one backend, with kernels of that KV format.
  static void check(const model::Model& draft, const model::Model& target, quant::KvFormat target_format);
  /// Of keys and values of a draft model in an engine with a format: the same, or int8 in place of one that seals.
  static quant::KvFormat kv_format_for(quant::KvFormat target_format);
  static kv::KvShape kv_shape(const model::Model& draft, quant::KvFormat target_format);

  // What happened to blocks, as for the engine's own storage.
  void copied(kv::BlockCopy copy);
  void cleared(BlockId block);
  void freed(BlockId block);

  /// Reads the rows of prompts and chunks that a step computes.
  void read_along(const StepPlan& plan);

  /// Whether a sequence with `count` guesses is one that it can read.
  bool can_guess(const Sequence& sequence, int count) const;

  /// Sets Sequence::drafts: as many as wanted; fewer in front of what would end the answer; none where more was missing
  /// than one step may read. Calls `measured` with the rows and seconds of each pass that guesses.
  void guess(std::span<const DraftWish> wishes, const std::function<void(int rows, double seconds)>& measured);

  /// The first `num_accepted` of the drafts of a sequence are right: called before it takes them.
  void settle(const Sequence& sequence, int num_accepted);

  std::int64_t kv_bytes() const { return storage_.bytes(); }
  /// That passes took so far.
  double seconds() const { return seconds_; }
  /// Tokens that were read, guesses included.
  std::int64_t num_read() const { return num_read_; }

 private:
  static constexpr int kFewRows = 2 * kBlockTokens;  // are read in the pass that guesses, not before

  int num_known(std::span<const BlockId> blocks) const;
  bool knows_chunks(const Sequence& sequence) const;
  void mark(const Sequence& sequence, int first, int count);
  void mark_slot(int slot);
  bool catch_up(Sequence& sequence, int& budget);
  bool read_chunk(const kv::Chunk& chunk, int& budget);
  void read(int num_rows);
  Tensor run();
  ops::ExecContext context();
  void draw(std::span<DraftWish> wishes, Tensor hidden);
  void draw_row(const DraftWish& wish, std::span<const float> logits, TokenId argmax, TokenId& drawn,
                sampling::Sampler& sampler, std::vector<float>& padded) const;
  const float* on_host(Tensor logits);

  Parts parts_;
  kv::KvStorage storage_;
  std::vector<std::uint8_t> num_filled_;  // leading cells of each block that hold the KV of its tokens
  Workspace workspace_;
  StepPlan plan_;
  StepBatch batch_;
  std::vector<DraftWish> active_;
  std::vector<std::int32_t> rows_;           // of active sequences: the last of each
  std::vector<TokenId> drawn_;               // by them; kNone: no guess
  std::vector<sampling::Sampler> samplers_;  // one per thread
  std::vector<std::vector<float>> padded_;   // likewise: logits as many as the target has
  std::vector<std::exception_ptr> errors_;   // likewise
  std::vector<float> host_logits_;           // where the models are on a device
  double seconds_ = 0.0;
  std::int64_t num_read_ = 0;
};

}  // namespace nb::engine
