// The engine's state of one answer to a request: its tokens, how many of them are computed, its blocks, its end.
//
// Not for deciding anything (scheduler.h). Owned by the scheduler, used by the thread that runs steps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "base/rng.h"
#include "engine/block_archive.h"
#include "engine/composition.h"
#include "engine/draft_source.h"
#include "engine/metrics.h"
#include "engine/open_groups.h"
#include "engine/request.h"
#include "kv/block_table.h"
#include "sampling/logprobs.h"
#include "tensor/allocator.h"

namespace nb::engine {

class Sequence {
 public:
  /// `request` has been validated; `eos_ids` stop it unless it ignores them. `choice_index`: which of its answers.
  Sequence(RequestId sequence_id, Request wanted, std::span<const TokenId> eos_ids, int max_model_len,
           int choice_index = 0)
      : id(sequence_id), choice(choice_index), request(std::move(wanted)), tokens(request.prompt) {
    request.sampling.choice_index += static_cast<std::uint32_t>(choice_index);
    num_prompt = static_cast<int>(tokens.size());
    max_len = num_prompt + std::min(request.max_tokens, max_model_len - rotation_room(request) - num_prompt);
    seed = request.sampling.seed ? *request.sampling.seed : random_seed();
    stop_ids = request.stop_token_ids;
    composition = Composition::create(request);
    if (request.make_monitor) monitor = request.make_monitor();
    if (request.make_constraint) constraint = request.make_constraint();
    if (!request.ignore_eos) stop_ids.insert(stop_ids.end(), eos_ids.begin(), eos_ids.end());
    request.prompt = {};
    tokens.reserve(static_cast<std::size_t>(max_len));  // so that commit() never allocates
  }

  int len() const { return static_cast<int>(tokens.size()); }

  // Own tokens, numbered in position order, are those whose KV is in the sequence's own blocks: all of them, unless it
  // is composed of chunks.

  /// Own tokens whose KV is stored. The scheduler alone writes it.
  int computed_len() const { return computed_len_; }
  int own_len() const { return len() - num_prompt + num_own_prompt(); }
  int num_own_prompt() const { return composition ? composition->num_own() : num_prompt; }
  /// Own tokens at the end of the longest answer.
  int max_own_len() const { return max_len - num_prompt + num_own_prompt(); }
  /// Position of an own token.
  int position_of(int own) const {
    if (!composition) return own;
    if (own >= num_own_prompt()) return num_prompt + own - num_own_prompt();
    return composition->positions()[static_cast<std::size_t>(own)];
  }
  /// Tokens from the beginning whose KV is exact once it is computed, and which may be taken from others: of a sequence
  /// that keeps nothing, none.
  int exact_len() const {
    if (!request.keeps_kv) return 0;
    return composition ? composition->lead_len() : std::min(len(), ops::exact_tokens(request.key_policy));
  }
  /// Whether it gives blocks back while it runs, and so takes them slice by slice.
  bool drops_kv() const { return !request.keeps_kv || request.key_policy.rule != ops::KeyRule::full; }
  /// Whether all of its prompt may be shared with further answers to it.
  bool shares_prompt() const { return !drops_kv() || exact_len() >= num_prompt; }
  /// Blocks that need not be computed if somebody has them: all full exact ones but for the last token, which must be
  /// computed for its logits.
  int reusable_blocks() const {
    if (scores_prompt() && !composition) return 0;
    return std::min(len() - 1, exact_len()) / kBlockTokens;
  }
  /// Own tokens still to be computed: 1 while decoding, the rest of the prompt before that.
  int pending_len() const { return own_len() - computed_len_; }
  /// Those of them that can be computed now: the others wait until it is known which tokens of chunks are among them.
  int next_rows() const { return is_selecting() ? exact_len() - computed_len_ : pending_len(); }
  bool is_selecting() const { return composition && composition->selecting(); }
  int num_generated() const { return len() - num_prompt; }
  /// Whether it runs, but none of it can be computed yet.
  bool waits() const { return leader != nullptr || load != 0; }
  bool finished() const { return finish_reason != FinishReason::none; }
  bool ends_early() const { return early_end != FinishReason::none; }
  bool stops_at(TokenId token) const { return std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end(); }
  /// Whether the token after the last one is wanted (not so for a request that only scores its prompt).
  bool generates() const { return max_len > num_prompt; }

  /// Whether the logits of prompt positions are wanted, so that all of the prompt must be computed.
  bool scores_prompt() const {
    return request.prompt_logprobs.has_value() || request.prompt_logits || request.observer.see;
  }
  /// First position whose logits prompt_logits has.
  int first_logits() const { return composition ? composition->tail_begin() : 0; }
  /// Computes a chunk for others, and nobody asked for an answer.
  bool is_internal() const { return encodes != 0; }
  /// The token at a position, or the draft of it.
  TokenId token_at(int position) const {
    return position < len() ? tokens[static_cast<std::size_t>(position)]
                            : drafts[static_cast<std::size_t>(position - len())];
  }
  /// Its tokens and the first `num_drafts` drafts.
  std::span<const TokenId> text_with(int num_drafts) const {
    if (num_drafts == 0) return tokens;
    return std::span(drafted_text).first(static_cast<std::size_t>(len() + num_drafts));
  }
  /// Keeps the first `count` drafts, for the step being planned.
  void set_drafts(int count) {
    drafts.resize(static_cast<std::size_t>(count));
    drafted_text = tokens;
    drafted_text.insert(drafted_text.end(), drafts.begin(), drafts.end());
  }
  /// Asks for its end with this reason; false if that has been asked for before.
  bool end_early(FinishReason reason) {
    if (ends_early()) return false;
    early_end = reason;
    return true;
  }
  /// Which of kKvPolicyNames it counts under.
  std::size_t kv_kind() const {
    return request.keeps_kv ? static_cast<std::size_t>(request.key_policy.rule) : kKvPolicyNames.size() - 1;
  }
  /// Blocks that it has references to; not those of chunks.
  int num_owned_blocks() const { return table.num_owned() + summaries.num_owned(); }
  /// Order of arrival.
  bool is_older_than(const Sequence& other) const { return id != other.id ? id < other.id : choice < other.choice; }

  /// Back to a sequence of which nothing is computed. Appends the blocks that became free to `freed`.
  void forget_blocks(kv::BlockPool& pool, std::vector<BlockId>& freed) {
    table.release(pool, freed);
    summaries.release(pool, freed);
    tail_block = 0;
    if (composition) composition->restart();
    computed_len_ = 0;
    num_published = 0;
    leader = nullptr;
    forks_leader = false;
    shared_len = 0;
    follows = false;
  }

  /// Hands over its blocks, which it needs no more.
  std::vector<BlockId> detach_blocks() {
    computed_len_ = 0;
    num_published = 0;
    return table.detach();
  }

  RequestId id;
  int choice;                   ///< which answer to the request
  Request request;              ///< its prompt has moved to `tokens`
  std::vector<TokenId> tokens;  ///< prompt, then output
  int num_prompt = 0;
  int max_len = 0;         ///< tokens at which it ends: prompt + max_tokens, or the context
  std::uint64_t seed = 0;  ///< the request's, or a random one
  std::vector<TokenId> stop_ids;
  std::unique_ptr<TokenMonitor> monitor;        ///< none: nobody watches
  std::unique_ptr<TokenConstraint> constraint;  ///< none: any token may come
  std::unique_ptr<Composition> composition;     ///< none: all tokens are its own
  std::vector<kv::ChunkContent> wanted_chunks;  ///< in order, once it has been tried to place it; views into the above
  bool counts_chunks = true;                    ///< its hits have not been counted yet
  std::vector<kv::ChunkId> chunks;              ///< it holds, once it is placed, to its end
  bool is_placed = false;                       ///< it holds all that it needs
  kv::ChunkId encodes = 0;                      ///< the chunk whose KV it computes, or 0
  kv::BlockTable table;
  kv::BlockTable summaries;     ///< of groups of tokens, a slot each, where its policy makes them
  int tail_block = 0;           ///< of the row before which blocks were last given back
  OpenPair open;                ///< cells of keys, while it runs, of KV formats that seal
  kv::PrefixKeys prefix{};      ///< its namespace in the prefix cache, and the keys of its blocks
  int num_published = 0;        ///< leading blocks of the table that are in the prefix cache
  Sequence* leader = nullptr;   ///< a running sequence that computes tokens this one needs too, which it waits for
  bool forks_leader = false;    ///< it is an answer to the same prompt, to be forked when that is stored
  int shared_len = 0;           ///< tokens it shares with the leader
  LoadId load = 0;              ///< under way, into its reserved blocks; nothing of it is computed meanwhile
  bool loads_chunk = false;     ///< all of the chunk that it encodes, not blocks of a prefix
  bool follows = false;         ///< runs, but without blocks for all its tokens, since it waits or waited for a leader
  bool was_computed = false;    ///< has taken part in a step
  std::vector<TokenId> drafts;  ///< of the step being planned or computed: guesses of its next tokens
  std::vector<TokenId> drafted_text;            ///< tokens and drafts, while there are drafts
  int num_constrained = 0;                      ///< drafts of this step that the constraint has already taken
  bool constraint_ends = false;                 ///< the last of them completed the answer
  std::unique_ptr<DraftState> draft_state;      ///< what the source of drafts remembers
  int num_drafted = 0;                          ///< drafts that were verified
  int num_accepted = 0;                         ///< and were right
  FinishReason early_end = FinishReason::none;  ///< the next commit() ends the sequence with it
  FinishReason finish_reason = FinishReason::none;
  std::string error;  ///< set while a token was drawn: commit() ends the sequence with it; or why it was aborted
  ErrorCode error_code = ErrorCode::invalid_argument;  ///< of `error`

  // What outputs report.
  int num_reported = 0;       ///< generated tokens already given out
  int num_cached_tokens = 0;  ///< prompt tokens found in a cache at admission
  RequestTimes times;
  std::vector<sampling::TokenLogprob> logprobs;         ///< [num_generated, 1 + logprobs] if asked for
  std::vector<sampling::TokenLogprob> prompt_logprobs;  ///< [num_prompt - 1, 1 + prompt_logprobs] if asked for
  Buffer prompt_logits;                                 ///< f32[num_prompt - first_logits(), V] if asked for

 private:
  friend class Scheduler;
  int computed_len_ = 0;
};

}  // namespace nb::engine
