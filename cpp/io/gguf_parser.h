// Checks a GGUF file from front to back and lists what it holds; the part of gguf_file that meets hostile bytes.
//
// Used by GgufFile only. Not for access to values. A pure function; safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "io/gguf_file.h"

namespace nb::io {

/// The directories of a file, checked; the views point into its bytes.
struct GgufContents {
  std::uint32_t version = 0;
  Metadata metadata;
  std::vector<GgufTensor> tensors;
  std::vector<std::uint32_t> names;  ///< indices of tensors in order of name
};

/// Throws format naming `path`, offset and key or tensor, and unsupported for version 1 and big-endian files. Takes
/// memory in proportion to the entries actually there, O(n log n) time, and at most 65536 keys and tensors.
GgufContents parse_gguf(std::span<const std::byte> bytes, const std::string& path);

}  // namespace nb::io
