#include "text/chat_render.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "base/error.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace nb::text {

namespace {

// ---- recognition ----

struct StyleMark {
  ChatStyle style;
  const char* mark;
};

constexpr StyleMark kStyleMarks[] = {
    {ChatStyle::chatml, "<|im_start|>"},
    {ChatStyle::llama3, "<|start_header_id|>"},
    {ChatStyle::llama2, "[INST]"},
};

/// What a template of a style has to spell, or may not: the differences between templates that share their marks.
struct Trait {
  ChatStyle style;
  const char* text;
  bool wanted;
  const char* meaning;
};

constexpr Trait kTraits[] = {
    {ChatStyle::chatml, "<|im_end|>", true, "the end of a message"},
    {ChatStyle::chatml, "bos_token", false, "a token before the first message"},
    {ChatStyle::chatml, "trim", false, "contents without white space around them"},
    {ChatStyle::chatml, "strip(", false, "contents without white space around them"},
    {ChatStyle::chatml, "think>", false, "thinking"},
    {ChatStyle::chatml, "system_message =", false, "a system message of its own"},
    {ChatStyle::chatml, "raise_exception", false, "rules for the order of messages"},
    {ChatStyle::llama2, "<<SYS>>", true, "a system message inside the first turn"},
    {ChatStyle::llama2, "bos_token", true, "a token before each turn"},
    {ChatStyle::llama2, "eos_token", true, "a token after each answer"},
    {ChatStyle::llama2, "strip()", true, "contents without white space around them"},
    {ChatStyle::llama2, "messages[0]['content'].strip()", false, "a system message without white space around it"},
    {ChatStyle::llama2, "system_message = '", false, "a system message of its own"},
    {ChatStyle::llama2, "system_message = \"", false, "a system message of its own"},
    {ChatStyle::llama3, "<|eot_id|>", true, "the end of a message"},
    {ChatStyle::llama3, "bos_token", true, "a token before the first message"},
    {ChatStyle::llama3, "trim", true, "contents without white space around them"},
    {ChatStyle::llama3, "Cutting Knowledge Date", false, "dates in the system message, as in Llama 3.1"},
    {ChatStyle::llama3, "think>", false, "thinking"},
    {ChatStyle::llama3, "system_message =", false, "a system message of its own"},
};

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

ChatStyle find_style(std::string_view source) {
  std::optional<ChatStyle> style;
  for (const StyleMark& row : kStyleMarks) {
    if (!contains(source, row.mark)) continue;
    NB_CHECK(!style, unsupported, "the chat template has the marks of both ", to_string(*style), " and ",
             to_string(row.style), "; native programs render only chatml, llama2 and llama3");
    style = row.style;
  }
  NB_CHECK(style, unsupported, "the chat template ", in_quotes(source.substr(0, 60)),
           " has none of the marks <|im_start|> (chatml), [INST] (llama2), <|start_header_id|> (llama3); native "
           "programs render only these");
  return *style;
}

/// The rest of a jinja string up to `end`, escapes resolved; nothing if the string ends before.
std::optional<std::string> literal_until(std::string_view rest, std::string_view end, char quote) {
  std::string out;
  while (!rest.empty() && rest[0] != quote) {
    if (rest.substr(0, end.size()) == end) return out;
    const bool escaped = rest[0] == '\\' && rest.size() > 1;
    const char c = escaped ? rest[1] : rest[0];
    out += escaped && c == 'n' ? '\n' : c;
    rest.remove_prefix(escaped ? 2 : 1);
  }
  return std::nullopt;
}

/// The system message that the template itself spells, from its beginning to its end in one string: '<|im_start|>
/// system, a line break, the message, <|im_end|>'. A break may be a real one or \n.
std::optional<std::string> spelled_system(std::string_view source) {
  for (const std::string_view begin : {"<|im_start|>system\n", "<|im_start|>system\\n"}) {
    for (std::size_t at = source.find(begin); at != std::string_view::npos; at = source.find(begin, at + 1)) {
      const char quote = at > 0 ? source[at - 1] : '\0';
      if (quote != '\'' && quote != '"') continue;
      std::optional<std::string> text = literal_until(source.substr(at + begin.size()), "<|im_end|>", quote);
      if (text) return text;
    }
  }
  return std::nullopt;
}

// ---- rendering ----

/// What Python's str.isspace calls white space: the property White_Space and four separators.
bool is_python_space(char32_t c) { return is_whitespace(c) || (c >= 0x1C && c <= 0x1F); }

std::string_view strip(std::string_view text) {
  while (!text.empty()) {
    const DecodedChar first = decode_utf8(text.data(), text.data() + text.size());
    if (!is_python_space(first.code_point)) break;
    text.remove_prefix(first.length);
  }
  while (!text.empty()) {
    std::size_t begin = text.size() - 1;
    while (begin > 0 && text.size() - begin < 4 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    const DecodedChar last = decode_utf8(text.data() + begin, text.data() + text.size());
    if (last.length != text.size() - begin || !is_python_space(last.code_point)) break;
    text.remove_suffix(last.length);
  }
  return text;
}

/// Collects pieces; ordinary text that meets ordinary text is joined with it.
struct PieceWriter {
  std::vector<ChatPiece> pieces;

  void control(std::string_view token) { pieces.push_back({std::string(token), true}); }
  void text(std::string_view text) {
    if (text.empty()) return;
    if (pieces.empty() || pieces.back().is_control) pieces.push_back({});
    pieces.back().text += text;
  }
};

void write_chatml(PieceWriter& out, std::string_view role, std::string_view content) {
  out.control("<|im_start|>");
  out.text(concat(role, "\n", content));
  out.control("<|im_end|>");
  out.text("\n");
}

void render_chatml(PieceWriter& out, const ChatFormat& format, std::span<const ChatMessage> messages, bool generate) {
  if (format.default_system && messages[0].role != ChatRole::system) {
    write_chatml(out, "system", *format.default_system);
  }
  for (const ChatMessage& message : messages) write_chatml(out, to_string(message.role), message.content);
  if (generate) {
    out.control("<|im_start|>");
    out.text("assistant\n");
  }
}

void render_llama2(PieceWriter& out, const ChatFormat& format, std::span<const ChatMessage> messages) {
  const std::size_t first = messages[0].role == ChatRole::system ? 1 : 0;
  NB_CHECK(messages.size() > first, invalid_argument, "llama2 has no place for a system message without a user's");
  for (std::size_t i = first; i < messages.size(); ++i) {
    const bool is_user = (i - first) % 2 == 0;
    NB_CHECK(messages[i].role == (is_user ? ChatRole::user : ChatRole::assistant), invalid_argument, "messages[", i,
             "] is of the ", to_string(messages[i].role), "; llama2 wants user and assistant in turn, the user first");
    std::string content = messages[i].content;
    if (i == first && first == 1) content = concat("<<SYS>>\n", messages[0].content, "\n<</SYS>>\n\n", content);
    if (is_user) {
      out.control(format.bos);
      out.text(concat("[INST] ", strip(content), " [/INST]"));
    } else {
      out.text(concat(" ", strip(content), " "));
      out.control(format.eos);
    }
  }
}

void render_llama3(PieceWriter& out, const ChatFormat& format, std::span<const ChatMessage> messages, bool generate) {
  const auto header = [&out](std::string_view role) {
    out.control("<|start_header_id|>");
    out.text(role);
    out.control("<|end_header_id|>");
    out.text("\n\n");
  };
  out.control(format.bos);
  for (const ChatMessage& message : messages) {
    header(to_string(message.role));
    out.text(strip(message.content));
    out.control("<|eot_id|>");
  }
  if (generate) header("assistant");
}

// ---- tokens ----

/// Appends ordinary text. Files may call a control token user-defined, and those are recognised in any text; cutting
/// the text inside the spelling of such a token keeps a user from writing it.
void encode_text(const Tokenizer& tokenizer, std::string_view text, std::span<const std::string> recognised,
                 std::vector<TokenId>& ids) {
  TextPlace place = ids.empty() ? TextPlace::start : TextPlace::after_token;
  std::size_t begin = 0;
  for (std::size_t end = 1; end <= text.size(); ++end) {
    const auto begins_before_end = [&](const std::string& token) {
      return text.substr(end - 1, token.size()) == token;
    };
    if (end < text.size() && std::none_of(recognised.begin(), recognised.end(), begins_before_end)) continue;
    const std::vector<TokenId> part = tokenizer.encode(text.substr(begin, end - begin), false, false, place);
    ids.insert(ids.end(), part.begin(), part.end());
    begin = end;
    place = TextPlace::within;
  }
}

}  // namespace

const char* to_string(ChatRole role) {
  constexpr const char* kNames[] = {"system", "user", "assistant"};
  return kNames[static_cast<int>(role)];
}

const char* to_string(ChatStyle style) {
  constexpr const char* kNames[] = {"chatml", "llama2", "llama3"};
  return kNames[static_cast<int>(style)];
}

ChatFormat find_chat_format(std::string_view template_source) {
  ChatFormat format{.style = find_style(template_source)};
  for (const Trait& trait : kTraits) {
    if (trait.style != format.style) continue;
    NB_CHECK(contains(template_source, trait.text) == trait.wanted, unsupported, "the chat template looks like ",
             to_string(format.style), trait.wanted ? " but lacks " : " but has ", in_quotes(trait.text), " (",
             trait.meaning, "): native programs render only the plain format");
  }
  if (format.style == ChatStyle::chatml) format.default_system = spelled_system(template_source);
  if (format.style == ChatStyle::llama2) format.bos = "<s>", format.eos = "</s>";
  if (format.style == ChatStyle::llama3) format.bos = "<|begin_of_text|>";
  return format;
}

ChatFormat find_chat_format(std::string_view template_source, const Tokenizer& tokenizer) {
  ChatFormat format = find_chat_format(template_source);
  if (!format.bos.empty() && tokenizer.bos() >= 0) format.bos = tokenizer.token_text(tokenizer.bos());
  if (!format.eos.empty() && tokenizer.eos() >= 0) format.eos = tokenizer.token_text(tokenizer.eos());
  return format;
}

std::vector<ChatPiece> render_chat(const ChatFormat& format, std::span<const ChatMessage> messages,
                                   bool add_generation_prompt) {
  NB_CHECK(!messages.empty(), invalid_argument, "the conversation has no messages");
  PieceWriter out;
  switch (format.style) {
    case ChatStyle::chatml:
      render_chatml(out, format, messages, add_generation_prompt);
      break;
    case ChatStyle::llama2:
      render_llama2(out, format, messages);
      break;
    case ChatStyle::llama3:
      render_llama3(out, format, messages, add_generation_prompt);
      break;
  }
  return std::move(out.pieces);
}

std::string join(std::span<const ChatPiece> pieces) {
  std::string out;
  for (const ChatPiece& piece : pieces) out += piece.text;
  return out;
}

std::vector<TokenId> encode_chat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces) {
  std::vector<std::string> recognised;
  for (const ChatPiece& piece : pieces) {
    if (!piece.is_control) continue;
    const std::optional<TokenId> id = tokenizer.find_token(piece.text);
    NB_CHECK(id, unsupported, "the chat format needs the token ", in_quotes(piece.text),
             ", which the tokenizer does not have");
    const bool known = std::find(recognised.begin(), recognised.end(), piece.text) != recognised.end();
    if (tokenizer.token_type(*id) == TokenType::user_defined && !known) recognised.push_back(piece.text);
  }
  std::vector<TokenId> ids;
  for (const ChatPiece& piece : pieces) {
    if (piece.is_control) {
      ids.push_back(tokenizer.find_token(piece.text).value());
    } else {
      encode_text(tokenizer, piece.text, recognised, ids);
    }
  }
  return ids;
}

}  // namespace nb::text
