#include "kv/store_record.h"

#include <bit>
#include <cstring>

#include "base/align.h"
#include "base/crc32c.h"
#include "base/error.h"

namespace nb::kv {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr char kMagic[8] = {'N', 'B', 'K', 'V', 'R', 'E', 'C', '\n'};
constexpr std::uint32_t kByteOrder = 0x01020304;
constexpr std::size_t kChecksumBytes = sizeof(std::uint32_t);

// The fixed part; offsets are those of the format.
struct Fixed {
  char magic[8];
  std::uint32_t version;
  std::uint32_t byte_order;
  std::uint32_t kind;
  std::uint32_t num_tokens;
  std::uint32_t position;
  std::uint32_t metadata_bytes;
  std::uint64_t block_bytes;
  Digest fingerprint;
  Digest root;
  Digest parent;
  Digest key;
};
static_assert(sizeof(Fixed) + kChecksumBytes == kStoreFixedBytes && offsetof(Fixed, fingerprint) == 40);

std::uint64_t blocks_of(std::uint64_t num_tokens) { return ceil_div<std::uint64_t>(num_tokens, kBlockTokens); }

std::uint64_t head_bytes_of(std::uint64_t num_tokens, std::uint64_t metadata_bytes) {
  const std::uint64_t bytes = kStoreFixedBytes + num_tokens * sizeof(TokenId) + metadata_bytes +
                              blocks_of(num_tokens) * kChecksumBytes + kChecksumBytes;
  return round_up<std::uint64_t>(bytes, kStoreAlignment);
}

/// Why no record has these values; null if one may.
const char* objection(std::uint32_t kind, std::uint64_t num_tokens, std::uint64_t metadata_bytes,
                      std::uint64_t block_bytes) {
  if (kind != static_cast<std::uint32_t>(RecordKind::prefix) && kind != static_cast<std::uint32_t>(RecordKind::chunk)) {
    return "the kind is unknown";
  }
  if (num_tokens == 0 || num_tokens > kMaxStoreTokens) return "the number of tokens is 0 or too large";
  if (kind == static_cast<std::uint32_t>(RecordKind::prefix) &&
      (num_tokens % kBlockTokens != 0 || num_tokens > kMaxPrefixTokens)) {
    return "a prefix record has 1 to 16 full blocks";
  }
  if (metadata_bytes > kMaxStoreMetadata) return "the metadata is too long";
  if (block_bytes == 0 || block_bytes > kMaxStoreBlockBytes) return "the size of a block is 0 or too large";
  return nullptr;
}

std::uint32_t checksum_at(std::span<const std::byte> bytes, std::size_t offset) {
  std::uint32_t value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

void copy_to(std::span<std::byte> out, std::size_t* offset, const void* from, std::size_t num_bytes) {
  if (num_bytes == 0) return;
  NB_ASSERT(*offset + num_bytes <= out.size());
  std::memcpy(out.data() + *offset, from, num_bytes);
  *offset += num_bytes;
}

}  // namespace

std::uint64_t record_head_bytes(const RecordInfo& info) {
  return head_bytes_of(info.tokens.size(), info.metadata.size());
}

std::uint64_t record_file_bytes(const RecordInfo& info) {
  return record_head_bytes(info) + info.num_blocks() * info.block_bytes;
}

void check_record(const RecordInfo& info) {
  const char* wrong =
      objection(static_cast<std::uint32_t>(info.kind), info.tokens.size(), info.metadata.size(), info.block_bytes);
  NB_CHECK(wrong == nullptr, invalid_argument, "a record of ", info.tokens.size(), " tokens with blocks of ",
           info.block_bytes, " bytes and ", info.metadata.size(), " bytes of metadata cannot be stored: ", wrong);
}

std::vector<std::byte> encode_record_head(const RecordInfo& info, const Digest& fingerprint,
                                          std::span<const std::uint32_t> checksums) {
  check_record(info);
  NB_ASSERT(checksums.size() == info.num_blocks());
  Fixed fixed{.magic = {},
              .version = kStoreVersion,
              .byte_order = kByteOrder,
              .kind = static_cast<std::uint32_t>(info.kind),
              .num_tokens = static_cast<std::uint32_t>(info.tokens.size()),
              .position = info.position,
              .metadata_bytes = static_cast<std::uint32_t>(info.metadata.size()),
              .block_bytes = info.block_bytes,
              .fingerprint = fingerprint,
              .root = info.root,
              .parent = info.parent,
              .key = info.key};
  std::memcpy(fixed.magic, kMagic, sizeof(kMagic));
  std::vector<std::byte> head(record_head_bytes(info));
  std::size_t at = 0;
  copy_to(head, &at, &fixed, sizeof(fixed));
  const std::uint32_t fixed_checksum = crc32c(std::span(head).first(at));
  copy_to(head, &at, &fixed_checksum, kChecksumBytes);
  copy_to(head, &at, info.tokens.data(), info.tokens.size() * sizeof(TokenId));
  copy_to(head, &at, info.metadata.data(), info.metadata.size());
  copy_to(head, &at, checksums.data(), checksums.size_bytes());
  at = head.size() - kChecksumBytes;
  const std::uint32_t checksum = crc32c(std::span(head).first(at));
  copy_to(head, &at, &checksum, kChecksumBytes);
  return head;
}

RecordFault measure_record_head(std::span<const std::byte> first, std::uint64_t file_bytes, std::uint64_t* head_bytes) {
  if (file_bytes < kStoreFixedBytes || first.size() < kStoreFixedBytes) return RecordFault::torn;
  Fixed fixed;
  std::memcpy(&fixed, first.data(), sizeof(fixed));
  if (std::memcmp(fixed.magic, kMagic, sizeof(kMagic)) != 0) return RecordFault::checksum;
  if (fixed.version != kStoreVersion || fixed.byte_order != kByteOrder) return RecordFault::version;
  if (crc32c(first.first(sizeof(fixed))) != checksum_at(first, sizeof(fixed))) return RecordFault::checksum;
  if (objection(fixed.kind, fixed.num_tokens, fixed.metadata_bytes, fixed.block_bytes) != nullptr) {
    return RecordFault::checksum;
  }
  // With these limits the sum stays below 2^53.
  *head_bytes = head_bytes_of(fixed.num_tokens, fixed.metadata_bytes);
  const std::uint64_t expected = *head_bytes + blocks_of(fixed.num_tokens) * fixed.block_bytes;
  return expected == file_bytes ? RecordFault::none : RecordFault::torn;
}

RecordFault parse_record_head(std::span<const std::byte> head, std::uint64_t file_bytes, RecordHead* out) {
  std::uint64_t head_bytes = 0;
  const RecordFault fault = measure_record_head(head, file_bytes, &head_bytes);
  if (fault != RecordFault::none) return fault;
  if (head.size() < head_bytes) return RecordFault::torn;
  head = head.first(head_bytes);
  const std::size_t end = head.size() - kChecksumBytes;
  if (crc32c(head.first(end)) != checksum_at(head, end)) return RecordFault::checksum;

  Fixed fixed;
  std::memcpy(&fixed, head.data(), sizeof(fixed));
  RecordInfo& info = out->info;
  info.kind = static_cast<RecordKind>(fixed.kind);
  info.root = fixed.root;
  info.parent = fixed.parent;
  info.key = fixed.key;
  info.position = fixed.position;
  info.block_bytes = fixed.block_bytes;
  out->fingerprint = fixed.fingerprint;
  const std::byte* at = head.data() + kStoreFixedBytes;
  info.tokens.resize(fixed.num_tokens);
  std::memcpy(info.tokens.data(), at, info.tokens.size() * sizeof(TokenId));
  at += info.tokens.size() * sizeof(TokenId);
  info.metadata.assign(reinterpret_cast<const char*>(at), fixed.metadata_bytes);
  at += fixed.metadata_bytes;
  out->checksums.resize(info.num_blocks());
  std::memcpy(out->checksums.data(), at, out->checksums.size() * kChecksumBytes);
  return RecordFault::none;
}

}  // namespace nb::kv
