// Checks a .braid file and lists what it holds; the part of braid_file that meets hostile bytes.
//
// Used by BraidFile only. Not for access to values or data. A pure function; safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "io/braid_file.h"

namespace nb::io {

/// The directories of a file, checked; the views point into its bytes.
struct BraidContents {
  std::uint32_t version = 0;
  Digest fingerprint{};
  BraidSection directory{};            ///< where the list of sections stands itself, as if it were one of kind 0
  std::vector<BraidSection> sections;  ///< by offset
  Metadata metadata;
  std::vector<BraidTensor> tensors;
  std::vector<std::uint32_t> names;  ///< indices of tensors in order of name
};

/// Throws format naming `path`, offset and section, key or tensor, and unsupported for other versions and sections.
/// Takes memory in proportion to the entries actually there, O(n log n) time, and touches no tensor data.
BraidContents parse_braid(std::span<const std::byte> bytes, const std::string& path);

}  // namespace nb::io
