// Fields of an identity: what goes into a digest with its name, so that no two lists of fields are the same bytes.
//
// Not for damage within a file (crc32c.h). Safe to use from any thread, on a hash of its own.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "base/sha256.h"

namespace nb {

/// Adds name and value, each behind its length in 8 bytes.
inline void add_field(Sha256& hash, std::string_view name, std::string_view value) {
  for (const std::string_view text : {name, value}) {
    const std::uint64_t size = text.size();
    hash.update(std::as_bytes(std::span(&size, 1)));
    hash.update(std::as_bytes(std::span(text)));
  }
}

}  // namespace nb
