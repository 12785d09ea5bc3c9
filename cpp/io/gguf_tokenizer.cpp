#include "io/gguf_tokenizer.h"

#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "text/normalize.h"
#include "text/pretokenize.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr const char* kTokens = "tokenizer.ggml.tokens";
constexpr const char* kTypes = "tokenizer.ggml.token_type";
constexpr const char* kMerges = "tokenizer.ggml.merges";
constexpr const char* kScores = "tokenizer.ggml.scores";
constexpr const char* kCharsMap = "tokenizer.ggml.precompiled_charsmap";

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

std::vector<TokenId> read_ids(const Metadata& file, const char* key, std::size_t num_tokens) {
  std::vector<TokenId> ids;
  for (const std::int64_t id : file.integers(key)) {
    NB_CHECK(static_cast<std::uint64_t>(id) < num_tokens, format, file.path(), ": key ", key, ": element ", ids.size(),
             " is ", id, ", outside the vocabulary of ", num_tokens, " tokens");
    ids.push_back(static_cast<TokenId>(id));
  }
  return ids;
}

std::vector<float> read_scores(const Metadata& file, std::size_t num_tokens) {
  const auto* stored = file.find(kScores);
  NB_CHECK(stored != nullptr, format, file.path(), ": key ", kScores, " is missing");
  using Type = decltype(stored->type);
  NB_CHECK(stored->type == Type::array && stored->element_type == Type::f32, format, file.path(), ": at offset ",
           stored->offset, ": key ", kScores, " is no array of f32");
  NB_CHECK(stored->count == num_tokens, format, file.path(), ": at offset ", stored->offset, ": key ", kScores, " has ",
           stored->count, " elements for ", num_tokens, " tokens");
  std::vector<float> scores(num_tokens);
  std::memcpy(scores.data(), stored->bytes.data(), num_tokens * sizeof(float));
  return scores;
}

// GGUF says only whether there is a dummy prefix; what readers of it do is the same for every stretch of text.
text::SpacePrefix read_space_prefix(const Metadata& file) {
  constexpr const char* kKey = "tokenizer.braid.space_prefix";
  if (!file.boolean("tokenizer.ggml.add_space_prefix", true)) return text::SpacePrefix::none;
  constexpr std::pair<const char*, text::SpacePrefix> kNames[] = {
      {"text", text::SpacePrefix::text},
      {"stretches", text::SpacePrefix::stretches},
      {"text_if_unspaced", text::SpacePrefix::text_if_unspaced},
      {"stretches_unspaced", text::SpacePrefix::stretches_unspaced}};
  const std::string_view found = file.string(kKey, "stretches");
  for (const auto& [name, prefix] : kNames) {
    if (found == name) return prefix;
  }
  fail(ErrorCode::unsupported, file.path(), ": key ", kKey, " is ", text::in_quotes(found),
       " (known: text, stretches, text_if_unspaced, stretches_unspaced)");
}

void read_sentencepiece(const Metadata& file, text::TokenizerSpec& spec) {
  spec.scores = read_scores(file, spec.tokens.size());
  spec.space_prefix = read_space_prefix(file);
  spec.remove_extra_whitespaces = file.boolean("tokenizer.ggml.remove_extra_whitespaces", false);
  const auto* map = file.find(kCharsMap);
  NB_CHECK(map == nullptr || map->count == 0, unsupported, file.path(), ": key ", kCharsMap,
           ": SentencePiece's normalisation by a compiled character map is not supported");
}

void read_byte_level(const Metadata& file, text::TokenizerSpec& spec) {
  constexpr const char* kKey = "tokenizer.braid.normalizer";
  // Byte-pair encoding without merges would split every text into bytes: wrong tokens, and no sign of it.
  NB_CHECK(file.has(kMerges), format, file.path(), ": key ", kMerges, " is missing");
  spec.merges = file.strings(kMerges);
  constexpr const char* kIgnoreMerges = "tokenizer.braid.ignore_merges";
  if (file.has(kIgnoreMerges)) spec.ignore_merges = file.boolean(kIgnoreMerges);
  if (!file.has(kKey)) return;
  const std::string_view name = file.string(kKey);
  NB_CHECK(name == "none" || name == "nfc", unsupported, file.path(), ": key ", kKey, " is ", text::in_quotes(name),
           " (known: none, nfc)");
  spec.nfc = name == "nfc";
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
  if (spec.model == "gpt2") read_byte_level(file, spec);
  if (spec.model == "llama") read_sentencepiece(file, spec);
  spec.bos = read_id(file, "tokenizer.ggml.bos_token_id", num_tokens);
  spec.eos = read_id(file, "tokenizer.ggml.eos_token_id", num_tokens);
  spec.eot = read_id(file, "tokenizer.ggml.eot_token_id", num_tokens);
  spec.eom = read_id(file, "tokenizer.ggml.eom_token_id", num_tokens);
  spec.eos_ids = read_ids(file, "tokenizer.braid.eos_token_ids", num_tokens);
  spec.lstrip = read_ids(file, "tokenizer.braid.lstrip_token_ids", num_tokens);
  spec.rstrip = read_ids(file, "tokenizer.braid.rstrip_token_ids", num_tokens);
  spec.unk = read_id(file, "tokenizer.ggml.unknown_token_id", num_tokens);
  spec.pad = read_id(file, "tokenizer.ggml.padding_token_id", num_tokens);
  spec.add_bos = file.boolean("tokenizer.ggml.add_bos_token", family_adds_bos(spec));
  spec.add_eos = file.boolean("tokenizer.ggml.add_eos_token", false);
  return spec;
}

std::unique_ptr<const text::Tokenizer> read_tokenizer(const Metadata& file) {
  const text::TokenizerSpec spec = read_tokenizer_spec(file);
  try {
    return std::make_unique<const text::Tokenizer>(spec);
  } catch (const Error& error) {
    fail(error.code(), file.path(), ": ", error.what());
  }
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
