// CRC32C (Castagnoli): finds accidental damage in files.
//
// Not for identity (sha256.h) and no defence against intent. Polynomial 0x1EDC6F41, bit-reflected, initial value and
// final xor all ones, as in iSCSI (RFC 3720). Pure functions; safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace nb {

/// The checksum of `bytes`. Chains: crc32c(b, crc32c(a)) is the checksum of a followed by b. Uses the instruction of
/// SSE4.2 where the machine has it.
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before = 0);

/// The same from tables, on any machine.
std::uint32_t crc32c_portable(std::span<const std::byte> bytes, std::uint32_t before = 0);

}  // namespace nb
