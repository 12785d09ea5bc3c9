#include "kv/store_record.h"

#include <gtest/gtest.h>

#include "base/code_of.h"
#include "base/crc32c.h"
#include "kv/disk_scratch.h"

namespace nb::kv {
namespace {

std::vector<std::uint32_t> numbers(std::size_t count) {
  std::vector<std::uint32_t> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = 1000 + static_cast<std::uint32_t>(i);
  return values;
}

TEST(StoreRecord, AHeadIsReadAsItWasWritten) {
  for (const RecordInfo& info : {chunk(1, 1), chunk(2, 40), chunk(3, 5000), link(1, 3), link(2, 1, 16)}) {
    const auto head = encode_record_head(info, kFingerprint, numbers(info.num_blocks()));
    EXPECT_EQ(head.size(), record_head_bytes(info));
    EXPECT_EQ(head.size() % kStoreAlignment, 0u);
    RecordHead read;
    ASSERT_EQ(parse_record_head(head, record_file_bytes(info), &read), RecordFault::none);
    EXPECT_EQ(read.fingerprint, kFingerprint);
    EXPECT_EQ(read.checksums, numbers(info.num_blocks()));
    EXPECT_EQ(read.info.kind, info.kind);
    EXPECT_EQ(read.info.position, info.position);
    EXPECT_EQ(read.info.tokens, info.tokens);
    EXPECT_EQ(read.info.metadata, info.metadata);
    EXPECT_EQ(read.info.block_bytes, info.block_bytes);
  }
}

TEST(StoreRecord, TheBytesAreThoseOfTheFormat) {
  const RecordInfo info = chunk(1, 40);
  const auto head = encode_record_head(info, kFingerprint, numbers(3));
  const auto u32 = [&](std::size_t at) {
    std::uint32_t value;
    std::memcpy(&value, head.data() + at, sizeof(value));
    return value;
  };
  EXPECT_EQ(std::memcmp(head.data(), "NBKVREC\n", 8), 0);
  EXPECT_EQ(u32(8), kStoreVersion);
  EXPECT_EQ(head[12], std::byte{4});  // byte order
  EXPECT_EQ(u32(16), 2u);
  EXPECT_EQ(u32(20), 40u);
  EXPECT_EQ(u32(28), info.metadata.size());
  EXPECT_EQ(u32(32), kBlockBytes);
  EXPECT_EQ(std::memcmp(head.data() + 40, kFingerprint.data(), 32), 0);
  EXPECT_EQ(std::memcmp(head.data() + 136, info.key.data(), 32), 0);
  EXPECT_EQ(u32(168), crc32c(std::span(head).first(168)));
  EXPECT_EQ(u32(172), static_cast<std::uint32_t>(info.tokens[0]));
  EXPECT_EQ(u32(172 + 160 + info.metadata.size()), 1000u);
  EXPECT_EQ(u32(head.size() - 4), crc32c(std::span(head).first(head.size() - 4)));
}

/// A head whose u32 at `at` is `value`, with checksums that are right.
RecordFault fault_with(std::size_t at, std::uint32_t value) {
  const RecordInfo info = link(1, 0);
  auto head = encode_record_head(info, kFingerprint, numbers(info.num_blocks()));
  std::memcpy(head.data() + at, &value, sizeof(value));
  for (const std::size_t end : {std::size_t{168}, head.size() - 4}) {
    const std::uint32_t checksum = crc32c(std::span(head).first(end));
    std::memcpy(head.data() + end, &checksum, sizeof(checksum));
  }
  RecordHead read;
  return parse_record_head(head, record_file_bytes(info), &read);
}

TEST(StoreRecord, ValuesThatNoRecordHasAreRefusedWhateverTheChecksums) {
  EXPECT_EQ(fault_with(24, 77), RecordFault::none);  // another position
  EXPECT_EQ(fault_with(16, 0), RecordFault::checksum);
  EXPECT_EQ(fault_with(16, 3), RecordFault::checksum);
  EXPECT_EQ(fault_with(20, 0), RecordFault::checksum);
  EXPECT_EQ(fault_with(20, 255), RecordFault::checksum);
  EXPECT_EQ(fault_with(20, 272), RecordFault::checksum);
  EXPECT_EQ(fault_with(20, 0xFFFFFFFF), RecordFault::checksum);
  EXPECT_EQ(fault_with(28, 0xFFFFFFFF), RecordFault::checksum);
  EXPECT_EQ(fault_with(32, 0), RecordFault::checksum);
  EXPECT_EQ(fault_with(36, 0xFFFFFFFF), RecordFault::checksum);
  EXPECT_EQ(fault_with(20, 240), RecordFault::torn);
  EXPECT_EQ(fault_with(28, 5000), RecordFault::torn);
  EXPECT_EQ(fault_with(8, kStoreVersion + 1), RecordFault::version);
}

}  // namespace
}  // namespace nb::kv
