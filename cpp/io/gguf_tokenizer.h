// What a model file's metadata say about its tokenizer and chat template.
//
// Only reads; the views in the result live as long as the file. Safe from any thread.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "io/metadata.h"
#include "text/tokenizer.h"

namespace nb::io {

/// Throws format naming the key if the tokenizer is missing or inconsistent. A missing pre-tokenizer is "default"; a
/// missing add_bos_token is what the family does. Whether the kind is known is text/tokenizer.h's to say.
text::TokenizerSpec read_tokenizer_spec(const Metadata& file);

/// The tokenizer itself, which does not need the file any more. Throws as read_tokenizer_spec and the constructor of
/// Tokenizer do, naming the file.
std::unique_ptr<const text::Tokenizer> read_tokenizer(const Metadata& file);

/// The jinja2 source of the chat template, if the file has one; throws format unless it is UTF-8. Untrusted input.
std::optional<std::string> read_chat_template(const Metadata& file);

}  // namespace nb::io
