// SHA-256 (FIPS 180-4), fed piece by piece: the identity of contents.
//
// Not for damage within a file (crc32c.h is ten times faster). An object is used by one thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace nb {

using Digest = std::array<std::byte, 32>;

/// 64 lower-case hexadecimal digits.
std::string to_hex(const Digest& digest);

class Sha256 {
 public:
  /// Uses the SHA instructions of x86 where the machine has them and `allow_instructions` is set.
  explicit Sha256(bool allow_instructions = true);

  void update(std::span<const std::byte> bytes);

  /// The digest of all that was given; the object must not be used afterwards.
  Digest finish();

 private:
  void (*compress_)(std::uint32_t* state, const std::byte* blocks, std::size_t num_blocks);
  std::array<std::uint32_t, 8> state_;
  std::array<std::byte, 64> pending_{};  // the block that is not full yet
  std::uint64_t num_bytes_ = 0;
};

}  // namespace nb
