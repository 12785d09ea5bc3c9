// Reads metadata entries, as GGUF files and our own hold them.
//
//   entry:   | string key | u32 type | value |          string: | u64 bytes | text |
//   array:   | u32 element type | u64 count | elements |
//
// Not for access to values (metadata.h). Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "io/byte_cursor.h"
#include "io/metadata.h"

namespace nb::io {

/// More than any model has; bounds the memory of the directory whatever a file claims.
inline constexpr std::uint64_t kMaxMetadataEntries = 1 << 16;
inline constexpr std::size_t kMaxKeyLength = 65535;  // GGUF: 2^16 - 1
/// A key of one byte and a u8.
inline constexpr std::uint64_t kMinMetadataEntryBytes = 8 + 1 + 4 + 1;

/// Takes `count` entries, which the caller has checked to be possible; the views point into the cursor's bytes. Throws
/// format naming path, offset and key. Whether a key occurs twice is found by Metadata.
std::vector<MetadataEntry> parse_entries(ByteCursor& in, std::uint64_t count);

}  // namespace nb::io
