#include "io/gguf_tokenizer.h"

#include <limits>
#include <string_view>

#include "base/error.h"
#include "text/pretokenize.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr const char* kTokens = "tokenizer.ggml.tokens";
constexpr const char* kTypes = "tokenizer.ggml.token_type";
constexpr const char* kMerges = "tokenizer.ggml.merges";

std::vector<text::TokenType> read_types(const Metadata& file, std::size_t num_tokens) {
  std::vector<text::TokenType> types;
  const MetadataValue* stored = file.find(kTypes);
  if (stored == nullptr) return types;
  NB_CHECK(stored->count == num_tokens, format, file.path(), ": at offset ", stored->offset, ": key ", kTypes, " has ",
           stored->count, " elements for ", num_tokens, " tokens");
  types.reserve(num_tokens);
  for (const std::int64_t type : file.integers(kTypes)) {
    NB_CHECK(type >= static_cast<std::int64_t>(text::TokenType::normal) &&
                 type <= static_cast<std::int64_t>(text::TokenType::byte),
             format, file.path(), ": key ", kTypes, ": token ", types.size(), " has the unknown type ", type);
    types.push_back(static_cast<text::TokenType>(type));
  }
  return types;
}

TokenId read_id(const Metadata& file, const char* key, std::size_t num_tokens) {
  if (!file.has(key)) return -1;
  const std::int64_t id = file.i64(key);
  // A negative id becomes a large number.
  NB_CHECK(static_cast<std::uint64_t>(id) < num_tokens, format, file.path(), ": key ", key, " is ", id,
           ", outside the vocabulary of ", num_tokens, " tokens");
  return static_cast<TokenId>(id);
}

// Whether texts begin with BOS where the file does not say. Unknown kinds are refused later, by the tokenizer.
bool family_adds_bos(const text::TokenizerSpec& spec) {
  if (spec.model != "gpt2") return spec.model == "llama";
  for (const text::PreTokenizer& known : text::pre_tokenizers()) {
    if (known.name == spec.pre) return known.adds_bos;
  }
  return false;
}

}  // namespace

text::TokenizerSpec read_tokenizer_spec(const Metadata& file) {
  text::TokenizerSpec spec;
  spec.model = std::string(file.string("tokenizer.ggml.model"));
  spec.pre = std::string(file.string("tokenizer.ggml.pre", "default"));
  spec.tokens = file.strings(kTokens);
  const std::size_t num_tokens = spec.tokens.size();
  NB_CHECK(num_tokens > 0, format, file.path(), ": key ", kTokens, " is missing or empty");
  NB_CHECK(num_tokens <= static_cast<std::size_t>(std::numeric_limits<TokenId>::max()), format, file.path(), ": key ",
           kTokens, " has ", num_tokens, " tokens, more than ids can number");
  spec.types = read_types(file, num_tokens);
  spec.merges = file.strings(kMerges);
  // Byte-pair encoding without merges would split every text into bytes: wrong tokens, and no sign of it.
  NB_CHECK(file.has(kMerges) || spec.model != "gpt2", format, file.path(), ": key ", kMerges, " is missing");
  spec.bos = read_id(file, "tokenizer.ggml.bos_token_id", num_tokens);
  spec.eos = read_id(file, "tokenizer.ggml.eos_token_id", num_tokens);
  spec.eot = read_id(file, "tokenizer.ggml.eot_token_id", num_tokens);
  spec.eom = read_id(file, "tokenizer.ggml.eom_token_id", num_tokens);
  spec.unk = read_id(file, "tokenizer.ggml.unknown_token_id", num_tokens);
  spec.pad = read_id(file, "tokenizer.ggml.padding_token_id", num_tokens);
  spec.add_bos = file.boolean("tokenizer.ggml.add_bos_token", family_adds_bos(spec));
  spec.add_eos = file.boolean("tokenizer.ggml.add_eos_token", false);
  return spec;
}

std::optional<std::string> read_chat_template(const Metadata& file) {
  constexpr const char* kKey = "tokenizer.chat_template";
  if (!file.has(kKey)) return std::nullopt;
  std::string source(file.string(kKey));
  NB_CHECK(text::replace_invalid_utf8(source) == source, format, file.path(), ": at offset ", file.find(kKey)->offset,
           ": key ", kKey, " is not UTF-8");
  return source;
}

}  // namespace nb::io
