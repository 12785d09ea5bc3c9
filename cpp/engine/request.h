// What a user asked for: token ids in, rules for drawing and stopping. Integers only; text is the caller's business.
//
// Not for what the engine knows about it while it runs (sequence.h). Plain data.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/ids.h"
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

/// The most answers to one prompt.
inline constexpr int kMaxChoices = 128;

struct Request {
  std::vector<TokenId> prompt{};
  sampling::SamplingParams sampling{};
  int max_tokens = 16;  ///< 0 only together with prompt_logprobs or prompt_logits
  std::vector<TokenId> stop_token_ids{};
  bool ignore_eos = false;  ///< the model's end-of-sequence tokens do not stop; stop_token_ids still do
  /// Log probability of every prompt token but the first, each with so many alternatives, 0..20.
  std::optional<int> prompt_logprobs{};
  bool prompt_logits = false;  ///< logits of every prompt position
  int n = 1;                   ///< answers to the prompt: choices 0 to n - 1, each with its own random numbers
  std::function<std::unique_ptr<TokenMonitor>()> make_monitor{};  ///< one for each answer; empty: none
  double timeout_seconds = 0.0;  ///< after submission it ends with what it has; 0 = no limit
  std::string cache_salt{};      ///< namespace of the prefix cache; requests of different ones share nothing
};

/// Throws invalid_argument naming field, value and range. A prompt as long as the context leaves no room for output
/// and is allowed only with max_tokens 0; max_tokens beyond the context is allowed and cut there.
void validate(const Request& request, int vocab_size, int max_model_len);

/// Why a sequence ended.
enum class FinishReason {
  none,     ///< it has not
  stop,     ///< an end-of-sequence or stop token, not part of the output
  length,   ///< max_tokens, or the end of the context
  abort,    ///< cancelled, or an error in a step it took part in, whose message is in the output
  timeout,  ///< its time was up
  error,    ///< it asked for the impossible, as only its text has shown; the message is in the output
};

/// "none", "stop", "length", "abort", "timeout" or "error".
const char* to_string(FinishReason reason);

}  // namespace nb::engine
