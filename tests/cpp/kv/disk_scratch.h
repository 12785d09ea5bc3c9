// What the tests of the disk store share: a directory of their own, and records whose content follows from a number.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "kv/disk_store.h"

namespace nb::kv {

inline Digest digest_of(std::string_view text) {
  Sha256 hash;
  hash.update(std::as_bytes(std::span(text)));
  return hash.finish();
}

inline Digest numbered(std::string_view kind, int number) { return digest_of(concat(kind, ' ', number)); }

/// A directory that is removed with the object.
class Scratch {
 public:
  Scratch() {
    std::string pattern = (std::filesystem::temp_directory_path() / "nb_disk_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    folder_ = pattern;
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  const std::string& folder() const { return folder_; }
  std::string store() const { return folder_ + "/store"; }

  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(store())) found.push_back(entry.path().filename());
    return found;
  }
  std::string only_file() const {
    const std::vector<std::string> found = names();
    if (found.size() != 1) throw std::runtime_error(concat(found.size(), " files"));
    return store() + "/" + found[0];
  }
  std::int64_t bytes() const {
    std::int64_t sum = 0;
    for (const auto& entry : std::filesystem::directory_iterator(store())) {
      sum += static_cast<std::int64_t>(entry.file_size());
    }
    return sum;
  }

 private:
  std::string folder_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_file(const std::string& path, std::string_view content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(content.data(), std::ssize(content));
}

inline void set_used_at(const std::string& path, std::int64_t seconds) {
  const timespec times[2] = {{.tv_sec = seconds, .tv_nsec = 0}, {.tv_sec = seconds, .tv_nsec = 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, path.c_str(), times, 0), 0) << path;
}

inline constexpr std::uint64_t kBlockBytes = 1000;  // no multiple of anything

inline std::vector<TokenId> some_tokens(int number, std::size_t count) {
  std::vector<TokenId> tokens(count);
  for (std::size_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<TokenId>((static_cast<std::size_t>(number) * 7919 + i) % 1000003);
  }
  return tokens;
}

inline RecordInfo chunk(int number, std::size_t num_tokens = 40, std::string_view space = "") {
  return {.kind = RecordKind::chunk,
          .root = digest_of(space),
          .parent = digest_of(space),
          .key = numbered("chunk", number),
          .tokens = some_tokens(number, num_tokens),
          .metadata = concat("chunk number ", number),
          .block_bytes = kBlockBytes};
}

/// Part `index` of chain `number`, behind those before it.
inline RecordInfo link(int number, int index, std::size_t num_tokens = kMaxPrefixTokens) {
  return {.kind = RecordKind::prefix,
          .root = digest_of(""),
          .parent = index == 0 ? digest_of("") : numbered("link", number * 1000 + index - 1),
          .key = numbered("link", number * 1000 + index),
          .position = static_cast<std::uint32_t>(index * 256),
          .tokens = some_tokens(number * 10 + index, num_tokens),
          .block_bytes = kBlockBytes};
}

/// What block `index` of the record of `key` must contain.
inline std::vector<std::byte> content(const Digest& key, std::size_t index, std::size_t bytes = kBlockBytes) {
  std::vector<std::byte> block(bytes);
  std::uint64_t state;
  std::memcpy(&state, key.data(), sizeof(state));
  state += index * 0x9E3779B97F4A7C15;
  for (std::byte& byte : block) {
    state = state * 6364136223846793005 + 1442695040888963407;
    byte = static_cast<std::byte>(state >> 56);
  }
  return block;
}

inline DiskStore::PutResult put(DiskStore& store, const RecordInfo& info, bool pinned = false) {
  const auto fill = [&](std::size_t block, std::span<std::byte> out) {
    const std::vector<std::byte> bytes = content(info.key, block, out.size());
    std::copy(bytes.begin(), bytes.end(), out.begin());
  };
  return store.put(info, fill, pinned);
}

inline bool is_right(const DiskRecord& record) {
  for (std::size_t i = 0; i < record.num_blocks(); ++i) {
    const std::vector<std::byte> expected = content(record.info().key, i, record.info().block_bytes);
    const std::span<const std::byte> block = record.block(i);
    if (!std::equal(block.begin(), block.end(), expected.begin(), expected.end())) return false;
  }
  return true;
}

inline bool serves(DiskStore& store, const RecordInfo& info) {
  const std::optional<DiskRecord> record = store.open(info.key, info.tokens);
  if (record) {
    EXPECT_TRUE(is_right(*record));
    EXPECT_EQ(record->num_blocks(), info.num_blocks());
  }
  return record.has_value();
}

inline DiskStoreOptions megabytes(int count) { return {.quota_bytes = std::int64_t{count} << 20}; }

/// Holds the writer of a store back in the middle of its first record, until it is let go.
class WriteGate {
 public:
  /// Has writing wait for this gate, which must outlive the store.
  void guard(DiskStoreOptions& options) {
    options.calls.write = [this](int descriptor, const void* from, std::size_t bytes) {
      reached_ = true;
      reached_.notify_all();
      open_.wait(false);
      return ::write(descriptor, from, bytes);
    };
  }
  void wait_until_reached() { reached_.wait(false); }
  void open() {
    open_ = true;
    open_.notify_all();
  }

 private:
  std::atomic<bool> reached_ = false, open_ = false;
};

inline const Digest kFingerprint = digest_of("a model");

inline std::int64_t all_misses(const DiskStore& store) {
  std::int64_t sum = 0;
  for (const std::int64_t count : store.stats().misses) sum += count;
  return sum;
}

}  // namespace nb::kv
