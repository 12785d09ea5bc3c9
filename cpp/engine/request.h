// What a user asked for: token ids in, rules for drawing and stopping. Integers only; text is the caller's business.
//
// Not for what the engine knows about it while it runs (sequence.h). Plain data.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "ops/key_policy.h"
#include "sampling/params.h"

namespace nb::engine {

/// Watches the tokens of one answer, to end it by rules that the engine does not know, such as strings in its text.
/// Called by the thread that runs steps, once for each token in order.
class TokenMonitor {
 public:
  virtual ~TokenMonitor() = default;

  /// Whether the answer ends with this token, which is part of it.
  virtual bool ends_with(TokenId token) noexcept = 0;
};

/// Says which tokens may come next in one answer, by rules that the engine does not know, such as a grammar of its
/// text. An answer is one for which every token was allowed when it came; the tokens that end a sequence are the
/// engine's business, and the constraint only says where they may stand. Never called by two threads at once, nor by
/// the same one always: allow() by any thread of the step, so that the answers of a step may be worked on side by side.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;

  /// Sets the bits of the tokens that may come next; token t is bit t % 32 (from the lowest) of word t / 32, and all
  /// are 0 before. Returns whether the answer may end here. Called before each token is drawn; what it throws ends this
  /// answer with its message, and no other.
  virtual bool allow(std::span<std::uint32_t> bits) = 0;

  /// Takes the next token, one that was allowed. Returns whether the answer is complete and nothing may follow. A
  /// failure is kept for the next allow().
  virtual bool accept(TokenId token) noexcept = 0;
};

/// A part of a prompt that is a chunk: tokens whose KV may be computed once, without what stands before them, and used
/// in other prompts too.
struct ChunkSpan {
  int begin;                      ///< of the prompt
  int count;                      ///< at least 1
  std::vector<TokenId> anchor{};  ///< stands before the tokens while they are computed, and is not part of the chunk
};

/// How the KV of chunks is used. `exact` computes the prompt as if there were none; the others are approximations:
/// a chunk has not seen what stands before it.
enum class ReuseMode : std::uint8_t {
  exact,
  isolated,  ///< chunks as they are
  blend,     ///< some of their tokens are computed again, seeing all that stands before them
};

/// Which tokens of chunks `blend` computes again.
enum class BlendSelection : std::uint8_t {
  deviation,  ///< those whose keys in the second layer differ most from the chunk's, over all chunks
  first,      ///< the first ones of every chunk
};

struct Reuse {
  ReuseMode mode = ReuseMode::exact;
  /// Nobody sees the first token of a chunk that does not stand first, unless it is computed again. Where it is the
  /// only one, it is computed like a token outside of chunks.
  bool mask_sink = true;
  double ratio = 0.15;  ///< of the tokens of chunks that `blend` computes again, rounded up; 1 is `exact`
  BlendSelection selection = BlendSelection::deviation;
};

/// "exact", "isolated" or "blend".
const char* to_string(ReuseMode mode);

/// The most answers to one prompt.
inline constexpr int kMaxChoices = 128;

/// Sees the logits (f32[V]) of prompt positions instead of keeping them.
struct LogitsObserver {
  int first = 0;  ///< position, and all behind it
  /// Called once for each, by the threads of the step at the same time; must not throw. Empty: nobody observes.
  std::function<void(int position, std::span<const float> logits)> see{};
};

struct Request {
  std::vector<TokenId> prompt{};
  sampling::SamplingParams sampling{};
  int max_tokens = 16;  ///< 0 only together with prompt_logprobs, prompt_logits or an observer
  std::vector<TokenId> stop_token_ids{};
  bool ignore_eos = false;  ///< the model's end-of-sequence tokens do not stop; stop_token_ids still do
  /// Log probability of every prompt token but the first, each with so many alternatives, 0..20.
  std::optional<int> prompt_logprobs{};
  bool prompt_logits = false;  ///< logits of every prompt position; with reused chunks, of those behind the last one
  LogitsObserver observer{};   ///< not with reused chunks
  /// Somebody reads each token when it comes: prompts that are computed beside it are cut so that steps stay short.
  bool streams = true;
  int n = 1;  ///< answers to the prompt: choices 0 to n - 1, each with its own random numbers
  std::function<std::unique_ptr<TokenMonitor>()> make_monitor{};  ///< one for each answer; empty: none
  /// One for each answer; empty: none. Not together with ignore_eos. An answer that is complete ends with `stop`; one
  /// that needs a token which other masks forbid (min_tokens too, if it is complete before) ends with `error`.
  std::function<std::unique_ptr<TokenConstraint>()> make_constraint{};
  double timeout_seconds = 0.0;     ///< after submission it ends with what it has; 0 = no limit
  std::string cache_salt{};         ///< namespace of the caches and chunks; requests of different ones share nothing
  std::vector<ChunkSpan> chunks{};  ///< parts of the prompt, ascending, apart
  Reuse reuse{};
  /// Nothing but the chunks is computed, and they are kept; max_tokens is 0. The answer ends when they are there.
  bool only_chunks = false;
  bool pin_chunks = false;  ///< with only_chunks: they stay until they are removed
  /// Which keys each token sees; blocks that nobody will see are given back. Not together with reuse of chunks.
  ops::KeyPolicy key_policy{};
  /// Whether its coming tokens are guessed and verified, several a step; none: as the engine does. True needs an engine
  /// that speculates, and keeps_kv.
  std::optional<bool> speculative{};
  bool keeps_kv = true;  ///< false: nothing stays from one output token to the next, for comparisons; n is 1
};

/// Whether chunks are to be used as an approximation: not where all of their tokens are computed again anyway.
bool wants_composition(const Request& request);

/// Positions at the end of the context that a request cannot have: queries are rotated to their distance from a chunk's
/// anchor, which may stand before the beginning of the prompt.
int rotation_room(const Request& request);

/// Throws invalid_argument naming field, value and range. A prompt as long as the context leaves no room for output
/// and is allowed only with max_tokens 0; max_tokens beyond the context is allowed and cut there.
void validate(const Request& request, int vocab_size, int max_model_len);

/// Why a sequence ended.
enum class FinishReason {
  none,     ///< it has not
  stop,     ///< an end-of-sequence or stop token, not part of the output; or its monitor or constraint ended it
  length,   ///< max_tokens, or the end of the context
  abort,    ///< cancelled, or an error in a step it took part in, whose message is in the output
  timeout,  ///< its time was up
  error,    ///< it asked for the impossible, as only its text has shown; the message is in the output
};

/// "none", "stop", "length", "abort", "timeout" or "error".
const char* to_string(FinishReason reason);

}  // namespace nb::engine
