// What readers and writers of .braid files agree on: magic, sizes, section kinds, numbers of the weight formats.
//
// The layout is drawn in braid_format.cpp and described byte by byte in ARCHITECTURE.md. Not for reading
// (braid_file.h) or writing (braid_writer.h). Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "quant/format.h"

namespace nb::io {

/// Not text, and damaged by whatever changes line ends.
inline constexpr std::string_view kBraidMagic =
    "\x89"
    "BRAID\r\n";
inline constexpr std::uint32_t kBraidVersion = 1;

inline constexpr std::uint64_t kBraidHeaderBytes = 128;
inline constexpr std::uint64_t kBraidFingerprintOffset = 40;
inline constexpr std::uint64_t kBraidSectionBytes = 32;     ///< one entry of the section directory
inline constexpr std::uint64_t kBraidSectionAlignment = 8;  ///< of sections other than data
inline constexpr std::uint64_t kBraidDataAlignment = 4096;  ///< of the data section, and of each tensor in the file
inline constexpr std::uint32_t kMaxBraidSections = 64;
inline constexpr std::uint64_t kMaxBraidTensors = 1 << 16;
inline constexpr std::size_t kMaxBraidNameLength = 64;  ///< of a tensor
inline constexpr std::uint32_t kMaxBraidDims = 4;
/// Of one tensor: keeps every size in bytes within 63 bits, whatever the format.
inline constexpr std::uint64_t kMaxBraidElements = std::uint64_t{1} << 60;

enum class BraidSectionKind : std::uint32_t { metadata = 1, tensors = 2, data = 3 };

/// Flag of a section: a reader that does not know its kind passes over it.
inline constexpr std::uint32_t kBraidSkippable = 1;

/// "METADATA", "TENSORS", "DATA" or "kind N".
std::string braid_section_name(std::uint32_t kind);

/// The number of a format in files.
std::uint32_t braid_code(quant::Format format);

/// The format behind a number; nothing if it is reserved or unknown.
std::optional<quant::Format> braid_format(std::uint32_t code);

/// "q4_1", also of reserved numbers, or "format N".
std::string braid_format_name(std::uint32_t code);

}  // namespace nb::io
