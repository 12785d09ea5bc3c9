// Fixed chat formats for programs without a template engine: messages to the text, and to the tokens, a model expects.
//
// Three formats, as their published jinja templates render them: chatml (SmolLM2, Qwen 2), llama2 and llama3. A
// file's template is recognised by its marks and never executed; one that does more than the fixed format is refused.
// Not for templates in general (python/nanobraid/chat_template.py). Pure functions; safe from any thread.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"

namespace nb::text {

class Tokenizer;

enum class ChatRole { system, user, assistant };

/// "system", "user", "assistant".
const char* to_string(ChatRole role);

struct ChatMessage {
  ChatRole role = ChatRole::user;
  std::string content;
};

enum class ChatStyle { chatml, llama2, llama3 };

/// "chatml", "llama2", "llama3".
const char* to_string(ChatStyle style);

struct ChatFormat {
  ChatStyle style = ChatStyle::chatml;
  std::optional<std::string> default_system{};  ///< chatml: what the template says where the first message is no system
  std::string bos{};                            ///< token that begins the text; chatml does not use it
  std::string eos{};                            ///< token that ends an answer; only llama2 uses it
};

/// Which format a file's jinja template is; `bos` and `eos` are the published ones. Throws `unsupported`, naming the
/// mark that is missing or in the way, for any other template: among them Mistral's ([INST] without <<SYS>>), those
/// that put dates into the system message (Llama 3.1) and those that deal with thinking (Qwen 3).
ChatFormat find_chat_format(std::string_view template_source);

/// The same with `bos` and `eos` as the file's tokenizer has them.
ChatFormat find_chat_format(std::string_view template_source, const Tokenizer& tokenizer);

/// A stretch of a rendered conversation: one control token, or ordinary text.
struct ChatPiece {
  std::string text;
  bool is_control = false;
};

/// The conversation in pieces; joined, they are what the template renders. Words of the format that are no control
/// tokens ("user", "[INST]") stand together with the contents, since they are tokenized together. llama2 and llama3
/// strip contents of white space as Python's str.strip does. `add_generation_prompt` ends with what begins an answer
/// (llama2 has nothing for it). Throws `invalid_argument`, naming the message, if there is none, or for llama2 if
/// user and assistant do not alternate after a system message.
std::vector<ChatPiece> render_chat(const ChatFormat& format, std::span<const ChatMessage> messages,
                                   bool add_generation_prompt = true);

/// Their texts, joined.
std::string join(std::span<const ChatPiece> pieces);

/// The tokens of the pieces. Control pieces become their token; ordinary text never becomes a control token or one of
/// the conversation's, whatever it spells. Throws `unsupported` naming a control token that the tokenizer lacks.
std::vector<TokenId> encode_chat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces);

}  // namespace nb::text
