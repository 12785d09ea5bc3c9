#include "io/file_digest.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "base/code_of.h"
#include "io/braid_writer.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::ScratchDir;

std::vector<std::byte> pattern(std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 251);
  return bytes;
}

Digest sha256(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.finish();
}

/// Longer than the file system's clock stands still.
void settle() { std::this_thread::sleep_for(std::chrono::milliseconds(130)); }

/// How often the content was read: progress comes once per piece, and once in all from a cache.
struct Counter {
  int calls = 0;
  ProgressFunction function() {
    return [this](std::uint64_t, std::uint64_t) { ++calls; };
  }
};

std::string cache_file(const std::string& folder) {
  std::string found;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    EXPECT_TRUE(found.empty());
    found = entry.path();
  }
  return found;
}

constexpr std::size_t kPieces = 3;
constexpr std::size_t kSize = (kPieces - 1) * (1 << 20) + 12345;

TEST(FileDigest, IsThatOfTheContent) {
  const ScratchDir scratch;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{1} << 20, kSize}) {
    const auto bytes = pattern(size);
    EXPECT_EQ(file_digest(scratch.write("file", bytes)), sha256(bytes)) << size;
  }
  EXPECT_EQ(code_of([&] { file_digest(scratch.path("none")); }), ErrorCode::io);
}

TEST(FileDigest, ASecondTimeReadsNothing) {
  const ScratchDir scratch;
  const auto bytes = pattern(kSize);
  const std::string path = scratch.write("file", bytes), cache = scratch.path("cache");
  std::filesystem::create_directory(cache);
  settle();
  Counter first, second, third;
  EXPECT_EQ(file_digest(path, cache, first.function()), sha256(bytes));
  EXPECT_EQ(first.calls, static_cast<int>(kPieces));
  EXPECT_EQ(file_digest(path, cache, second.function()), sha256(bytes));
  EXPECT_EQ(second.calls, 1);
  std::filesystem::create_symlink(path, scratch.path("link"));
  EXPECT_EQ(file_digest(scratch.path("link"), cache, third.function()), sha256(bytes));
  EXPECT_EQ(third.calls, 1);
  struct stat status {};
  ASSERT_EQ(::stat(cache_file(cache).c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
}

TEST(FileDigest, AnEditOfTheSameLengthWithItsTimeSetBackIsSeen) {
  const ScratchDir scratch;
  auto bytes = pattern(kSize);
  const std::string path = scratch.write("file", bytes), cache = scratch.path("cache");
  std::filesystem::create_directory(cache);
  settle();
  const Digest before = file_digest(path, cache);
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  bytes[kSize / 2] ^= std::byte{1};
  scratch.write("file", bytes);
  const timespec times[2] = {status.st_atim, status.st_mtim};
  ASSERT_EQ(::utimensat(AT_FDCWD, path.c_str(), times, 0), 0);
  EXPECT_EQ(file_digest(path, cache), sha256(bytes));  // at once, and later
  settle();
  EXPECT_EQ(file_digest(path, cache), sha256(bytes));
  EXPECT_NE(file_digest(path, cache), before);
}

TEST(FileDigest, AFileThatWasJustChangedIsNotRemembered) {
  const ScratchDir scratch;
  const std::string path = scratch.write("file", pattern(100)), cache = scratch.path("cache");
  std::filesystem::create_directory(cache);
  file_digest(path, cache);
  EXPECT_EQ(cache_file(cache), "");
}

TEST(FileDigest, ADamagedOrForeignMemoryIsIgnored) {
  const ScratchDir scratch;
  const auto bytes = pattern(kSize);
  const std::string path = scratch.write("file", bytes), cache = scratch.path("cache");
  std::filesystem::create_directory(cache);
  settle();
  file_digest(path, cache);
  const std::string memory = cache_file(cache);
  std::vector<char> whole(std::filesystem::file_size(memory));
  ASSERT_EQ(std::ifstream(memory).read(whole.data(), std::ssize(whole)).gcount(), std::ssize(whole));
  for (std::size_t at = 0; at <= whole.size(); ++at) {  // each byte flipped; at last one too few
    std::vector<char> damaged = whole;
    if (at < whole.size()) damaged[at] ^= 16;
    damaged.resize(whole.size() - (at == whole.size() ? 1 : 0));
    std::ofstream(memory, std::ios::trunc).write(damaged.data(), std::ssize(damaged));
    Counter counter;
    ASSERT_EQ(file_digest(path, cache, counter.function()), sha256(bytes)) << at;
    ASSERT_EQ(counter.calls, static_cast<int>(kPieces)) << at;
  }
  Counter counter;
  EXPECT_EQ(file_digest(path, scratch.path("no such folder"), counter.function()), sha256(bytes));
  EXPECT_EQ(counter.calls, static_cast<int>(kPieces));
}

TEST(FileDigest, AFileThatChangesWhileItIsReadIsAnError) {
  const ScratchDir scratch;
  const std::string path = scratch.write("file", pattern(kSize)), cache = scratch.path("cache");
  std::filesystem::create_directory(cache);
  settle();
  bool changed = false;
  const auto change = [&](std::uint64_t, std::uint64_t) {
    if (!changed) std::ofstream(path, std::ios::in | std::ios::out).put('x');
    changed = true;
  };
  EXPECT_EQ(code_of([&] { file_digest(path, cache, change); }), ErrorCode::io);
  EXPECT_EQ(cache_file(cache), "");
}

TEST(FileDigest, AModelWhoseWeightsWereEditedIsAnotherThoughItsFingerprintStayed) {
  const ScratchDir scratch;
  const std::string path = scratch.path("model.braid");
  {
    BraidWriter writer(path, MetadataWriter(), {{.name = "w", .format = quant::Format::f32, .shape = {4}}});
    const std::vector<float> weights = {1, 2, 3, 4};
    writer.write(0, std::as_bytes(std::span<const float>(weights)));
    writer.finish();
  }
  const auto source = open_model(path);
  const Digest before = model_digest(*source);
  EXPECT_EQ(model_digest(*open_model(path)), before);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(source->tensors()[0].offset));
    file.put('\1');
  }
  const auto edited = open_model(path);
  EXPECT_EQ(edited->fingerprint(), source->fingerprint());
  EXPECT_NE(model_digest(*edited), before);
}

}  // namespace
}  // namespace nb::io
