// Fuzz target: any bytes are a record of the disk store. What is read lies inside the file and gives the same bytes
// when it is written again. Checksums are also repaired first, or nothing but them would ever be tested.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "base/crc32c.h"
#include "kv/store_record.h"

namespace {

using nb::kv::RecordFault;

void require(bool condition) {
  if (!condition) std::abort();
}

void repair(std::vector<std::byte>& bytes, std::size_t at) {
  const std::uint32_t checksum = nb::crc32c(std::span(bytes).first(at));
  std::memcpy(bytes.data() + at, &checksum, sizeof(checksum));
}

RecordFault check(std::span<const std::byte> bytes) {
  nb::kv::RecordHead head;
  const RecordFault fault = nb::kv::parse_record_head(bytes, bytes.size(), &head);
  if (fault != RecordFault::none) return fault;
  nb::kv::check_record(head.info);
  require(nb::kv::record_file_bytes(head.info) == bytes.size());
  require(head.checksums.size() == head.info.num_blocks());
  const std::vector<std::byte> again = nb::kv::encode_record_head(head.info, head.fingerprint, head.checksums);
  const std::size_t used =
      nb::kv::kStoreFixedBytes + 4 * head.info.tokens.size() + head.info.metadata.size() + 4 * head.checksums.size();
  require(again.size() <= bytes.size() && used + 4 <= again.size());
  require(std::equal(again.begin(), again.begin() + static_cast<std::ptrdiff_t>(used), bytes.begin()));
  // Every shorter file is another file.
  require(nb::kv::parse_record_head(bytes, bytes.size() - 1, &head) == RecordFault::torn);
  require(nb::kv::parse_record_head(bytes.first(again.size() - 1), bytes.size(), &head) == RecordFault::torn);
  return fault;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::byte> bytes(size);
  if (size > 0) std::memcpy(bytes.data(), data, size);
  static_cast<void>(check(bytes));
  constexpr std::size_t kFixed = nb::kv::kStoreFixedBytes;
  if (size < kFixed) return 0;
  repair(bytes, kFixed - 4);
  std::uint64_t head_bytes = 0;
  if (nb::kv::measure_record_head(bytes, size, &head_bytes) != RecordFault::none) return 0;
  require(head_bytes <= size && head_bytes >= nb::kv::kStoreAlignment);
  repair(bytes, head_bytes - 4);
  require(check(bytes) == RecordFault::none);
  return 0;
}
