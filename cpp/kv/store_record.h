// The file format of the disk store: one record holds the KV of up to 16 blocks of a prefix chain, or of one chunk.
//
//   head   fixed part   "NBKVREC\n", u32 version, u32 byte order, u32 kind, u32 tokens, u32 position, u32 metadata
//   bytes,
//                       u64 bytes of a block, fingerprint, root, parent, key (32 bytes each), u32 CRC32C of all this
//          tokens (i32 each), metadata, CRC32C of each block (u32 each), zeros, and in the last four bytes the CRC32C
//          of the whole head, which is a multiple of 4096 bytes
//   blocks one after another, without gaps, to the end of the file
//
// Little-endian. Every byte of a file is covered by a checksum or by a comparison. Pure functions over bytes, which may
// be anybody's; not for files (store_directory.h). Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/sha256.h"

namespace nb::kv {

inline constexpr std::uint32_t kStoreVersion = 1;
inline constexpr std::size_t kStoreAlignment = 4096;
inline constexpr std::size_t kStoreFixedBytes = 172;  ///< with its checksum
inline constexpr std::size_t kMaxPrefixTokens = 256;  ///< of one record of a chain
inline constexpr std::size_t kMaxStoreTokens = std::size_t{1} << 24;
inline constexpr std::size_t kMaxStoreMetadata = std::size_t{1} << 16;
inline constexpr std::uint64_t kMaxStoreBlockBytes = std::uint64_t{1} << 32;

enum class RecordKind : std::uint32_t {
  prefix = 1,  ///< full blocks of a prefix chain, exact behind their parent
  chunk = 2,   ///< a token list encoded from position 0 on
};

/// What a record says about itself.
struct RecordInfo {
  RecordKind kind = RecordKind::prefix;
  Digest root{};               ///< the namespace it belongs to
  Digest parent{};             ///< the chain key of what precedes it, or the root
  Digest key{};                ///< its own
  std::uint32_t position = 0;  ///< tokens before its first one
  std::vector<TokenId> tokens{};
  std::string metadata{};  ///< opaque to the store
  std::uint64_t block_bytes = 0;

  std::size_t num_blocks() const { return (tokens.size() + kBlockTokens - 1) / kBlockTokens; }
};

/// What is wrong with bytes that should be a record.
enum class RecordFault {
  none,
  torn,      ///< the file has another length than its head says
  checksum,  ///< damaged, or never a record
  version,   ///< of another version or byte order; nothing else of it can be judged
};

struct RecordHead {
  RecordInfo info{};
  Digest fingerprint{};
  std::vector<std::uint32_t> checksums{};  ///< of each block
};

/// Bytes of the head of such a record, and of its whole file.
std::uint64_t record_head_bytes(const RecordInfo& info);
std::uint64_t record_file_bytes(const RecordInfo& info);

/// Throws invalid_argument unless `info` can be written and read again.
void check_record(const RecordInfo& info);

/// The head of a record whose blocks have these checksums, one for each block.
std::vector<std::byte> encode_record_head(const RecordInfo& info, const Digest& fingerprint,
                                          std::span<const std::uint32_t> checksums);

/// How many bytes the head of a file of `file_bytes` bytes has, from its first bytes, of which kStoreFixedBytes are
/// needed if the file has so many. Not more than `file_bytes` if there is no fault.
RecordFault measure_record_head(std::span<const std::byte> first, std::uint64_t file_bytes, std::uint64_t* head_bytes);

/// Reads the whole head of a file of `file_bytes` bytes. Allocates no more than the head's size.
RecordFault parse_record_head(std::span<const std::byte> head, std::uint64_t file_bytes, RecordHead* out);

}  // namespace nb::kv
