#include "text/byte_bpe.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::text {

ByteBpe::ByteBpe(Vocabulary& vocabulary, const PreTokenizer& pre_tokenizer, std::span<const std::string_view> merges,
                 std::span<const TokenId> protect)
    : vocabulary_(&vocabulary), pre_tokenizer_(pre_tokenizer) {
  const std::vector<Merge> parsed = parse_merges(merges);
  merges_ = MergeTable(parsed);
  find_byte_tokens();
  for (const TokenId id : protect) {
    const bool is_byte = std::find(byte_tokens_.begin(), byte_tokens_.end(), id) != byte_tokens_.end();
    const bool is_merged = std::any_of(parsed.begin(), parsed.end(), [id](const Merge& m) { return m.merged == id; });
    if (!is_byte && !is_merged && !is_special_type(vocabulary.type(id))) vocabulary.set_type(id, TokenType::control);
  }
  whole_ = std::make_unique<std::atomic<Whole>[]>(static_cast<std::size_t>(vocabulary.size()));
}

std::vector<Merge> ByteBpe::parse_merges(std::span<const std::string_view> merges) const {
  std::vector<Merge> parsed;
  parsed.reserve(merges.size());
  std::string joined;
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    const auto known = [&](std::string_view text) {
      const TokenId id = vocabulary_->find_text(text);
      NB_CHECK(id >= 0, format, "merge ", i, " (", in_quotes(merge), "): ", in_quotes(text), " is not a token");
      return id;
    };
    // The left part is not empty, so that it may begin with a space.
    const std::size_t space = merge.empty() ? std::string_view::npos : merge.find(' ', 1);
    NB_CHECK(space != std::string_view::npos && space + 1 < merge.size(), format, "merge ", i, " (", in_quotes(merge),
             ") does not have the form \"left right\"");
    const std::string_view left = merge.substr(0, space);
    const std::string_view right = merge.substr(space + 1);
    // The part that is wrong is named in the order joined, left, right.
    Merge found{vocabulary_->find_text(left), vocabulary_->find_text(right), -1};
    if (found.left >= 0 && found.right >= 0 && vocabulary_->is_spelled(found.left) &&
        vocabulary_->is_spelled(found.right)) {
      joined.assign(vocabulary_->stored(found.left)).append(vocabulary_->stored(found.right));
      found.merged = vocabulary_->find_bytes(joined);  // what the joined text spells: spares to spell it
    }
    if (found.merged < 0) {
      joined.assign(left).append(right);
      found = {-1, -1, known(joined)};
      found.left = known(left);
      found.right = known(right);
    }
    // The text of an added or unused token is no spelling: what it stands for may differ from what is merged.
    joined.assign(vocabulary_->bytes(found.left)).append(vocabulary_->bytes(found.right));
    const bool keeps_text =
        !is_special_type(vocabulary_->type(found.merged)) && vocabulary_->bytes(found.merged) == joined;
    parsed.push_back({found.left, found.right, keeps_text ? found.merged : -1});
  }
  return parsed;
}

void ByteBpe::find_byte_tokens() {
  for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
    const char c = static_cast<char>(static_cast<std::uint8_t>(byte));
    byte_tokens_[byte] = vocabulary_->find_bytes(std::string_view(&c, 1));
  }
}

bool ByteBpe::is_whole(TokenId id) const {
  std::atomic<Whole>& known = whole_[static_cast<std::size_t>(id)];
  Whole state = known.load(std::memory_order_relaxed);
  if (state == Whole::unknown) {
    bool is_whole = false;
    const std::string_view bytes = vocabulary_->bytes(id);
    if (vocabulary_->find_bytes(bytes) == id && !is_special_type(vocabulary_->type(id))) {
      std::vector<TokenId> ids;
      if (!pre_tokenizer_.whole_pieces_first) append_merged(bytes, ids);
      is_whole = pre_tokenizer_.whole_pieces_first || (ids.size() == 1 && ids[0] == id);
    }
    state = is_whole ? Whole::yes : Whole::no;  // whoever else finds it out writes the same
    known.store(state, std::memory_order_relaxed);
  }
  return state == Whole::yes;
}

void ByteBpe::append(std::string_view text, std::vector<TokenId>& ids) const {
  while (!text.empty()) {
    const std::string_view piece = text.substr(0, pre_tokenizer_.next_piece(text));
    text.remove_prefix(piece.size());
    if (piece.size() <= vocabulary_->max_token_bytes()) {
      const TokenId id = vocabulary_->find_bytes(piece);
      if (id >= 0 && is_whole(id)) {
        ids.push_back(id);
        continue;
      }
    }
    append_merged(piece, ids);
  }
}

void ByteBpe::append_merged(std::string_view piece, std::vector<TokenId>& ids) const {
  const std::size_t first = ids.size();
  for (const char c : piece) {
    const TokenId id = byte_tokens_[static_cast<std::uint8_t>(c)];
    if (id >= 0) ids.push_back(id);
  }
  merge_symbols(merges_, ids, first);
}

}  // namespace nb::text
