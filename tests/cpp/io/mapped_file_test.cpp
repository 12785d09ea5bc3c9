#include "io/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <iterator>
#include <thread>
#include <vector>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;

test::Bytes counting(std::size_t size) {
  test::Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 31 >> 3);
  return bytes;
}

class MappedFileTest : public testing::Test {
 protected:
  test::ScratchDir dir_;
};

TEST_F(MappedFileTest, ShowsTheWholeFile) {
  const test::Bytes content = counting(10000);
  const std::string path = dir_.write("file", content);
  const MappedFile file(path);
  EXPECT_TRUE(std::equal(content.begin(), content.end(), file.bytes().begin(), file.bytes().end()));
  EXPECT_EQ(file.reader().size(), 10000u);
  EXPECT_EQ(file.reader().path(), path);
}

TEST_F(MappedFileTest, StaysReadableAfterItsPagesWereGivenBack) {
  const test::Bytes content = counting(100000);
  const MappedFile file(dir_.write("file", content));
  file.advise_dont_need();
  EXPECT_TRUE(std::equal(content.begin(), content.end(), file.bytes().begin(), file.bytes().end()));
}

TEST_F(MappedFileTest, ChecksBounds) {
  const std::string path = dir_.write("file", counting(100));
  const MappedFile file(path);
  EXPECT_EQ(file.bytes_at(40, 60).size(), 60u);
  EXPECT_EQ(file.bytes_at(40, 60).data(), file.bytes().data() + 40);
  EXPECT_EQ(file.bytes_at(100, 0).size(), 0u);
  const auto at = [&](std::uint64_t offset, std::uint64_t length) {
    return [&file, offset, length] { static_cast<void>(file.bytes_at(offset, length)); };
  };
  expect_error(ErrorCode::format, at(40, 61), path, "61 bytes at offset 40");
  expect_error(ErrorCode::format, at(101, 0), path);
  expect_error(ErrorCode::format, at(~std::uint64_t{0}, 2), path);
  expect_error(ErrorCode::format, at(2, ~std::uint64_t{0}), path);
}

TEST_F(MappedFileTest, RefusesWhatIsNoFile) {
  const auto open = [](const std::string& path) { return [path] { MappedFile{path}; }; };
  expect_error(ErrorCode::io, open(dir_.path("absent")), dir_.path("absent"), "No such file");
  expect_error(ErrorCode::io, open(dir_.path("")), "is a directory");
  expect_error(ErrorCode::io, open("/dev/null"), "/dev/null", "not a regular file");
  expect_error(ErrorCode::format, open(dir_.write("empty", {})), dir_.path("empty"), "the file is empty");

  const std::string pipe = dir_.path("pipe");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  expect_error(ErrorCode::io, open(pipe), pipe, "not a regular file");  // and does not wait for a writer

  const std::string loop = dir_.path("loop");
  ASSERT_EQ(::symlink(loop.c_str(), loop.c_str()), 0);
  expect_error(ErrorCode::io, open(loop), loop, "symbolic links");
}

TEST_F(MappedFileTest, SaysWhyAFileIsOutOfReach) {
  const std::string path = dir_.write("secret", counting(10));
  ASSERT_EQ(::chmod(path.c_str(), 0), 0);
  const bool is_root = ::geteuid() == 0;  // root may read anything
  if (is_root) {
    ASSERT_EQ(::chmod(dir_.path("").c_str(), 0755), 0);
    ASSERT_EQ(::seteuid(65534), 0);
  }
  expect_error(
      ErrorCode::io, [&] { MappedFile{path}; }, path, "Permission denied");
  if (is_root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
}

TEST_F(MappedFileTest, ManyOpensLeakNoDescriptor) {
  const std::string path = dir_.write("file", counting(10));
  const auto open_descriptors = [] {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return std::distance(begin(entries), end(entries));
  };
  const auto before = open_descriptors();
  for (int i = 0; i < 50; ++i) {
    const MappedFile file(path);
    expect_error(
        ErrorCode::io, [] { FileReader{"/"}; }, "directory");
    expect_error(
        ErrorCode::format, [&] { MappedFile{dir_.write("empty", {})}; }, "empty");
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST_F(MappedFileTest, ReadsAtPositions) {
  const test::Bytes content = counting(5000);
  const FileReader reader(dir_.write("file", content));
  test::Bytes out(1234);
  reader.read(777, out);
  EXPECT_TRUE(std::equal(out.begin(), out.end(), content.begin() + 777));
  reader.read(5000, {});  // nothing, at the end
}

TEST_F(MappedFileTest, ReadNamesOffsetAndLengthWhereTheFileEnds) {
  const std::string path = dir_.write("file", counting(100));
  const FileReader reader(path);
  test::Bytes out(50);
  expect_error(
      ErrorCode::io, [&] { reader.read(60, out); }, path, "50 bytes at offset 60", "ends after 40");
  expect_error(
      ErrorCode::io, [&] { reader.read(1000, out); }, path, "50 bytes at offset 1000");
  expect_error(
      ErrorCode::io, [&] { reader.read(~std::uint64_t{0}, out); }, path, "offset 18446744073709551615");
}

TEST_F(MappedFileTest, ReadNoticesAFileThatShrank) {
  const std::string path = dir_.write("file", counting(100));
  const FileReader reader(path);
  ASSERT_EQ(::truncate(path.c_str(), 30), 0);
  test::Bytes out(50);
  expect_error(
      ErrorCode::io, [&] { reader.read(10, out); }, path, "offset 10", "ends after 20");
}

TEST_F(MappedFileTest, KeepsReadingAFileThatWasReplaced) {
  const test::Bytes content = counting(100);
  const std::string path = dir_.write("file", content);
  const MappedFile file(path);
  ASSERT_EQ(::rename(dir_.write("other", counting(7)).c_str(), path.c_str()), 0);
  test::Bytes out(100);
  file.reader().read(0, out);
  EXPECT_EQ(out, content);
}

TEST_F(MappedFileTest, ReadsFromManyThreadsAtOnce) {
  const test::Bytes content = counting(100000);
  const FileReader reader(dir_.write("file", content));
  std::array<bool, 4> same{};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < same.size(); ++t) {
    threads.emplace_back([&, t] {
      bool all = true;
      test::Bytes out(1000);
      for (std::size_t i = 0; i < 90; ++i) {
        const std::size_t at = (i * 1009 + t * 13) % 99000;
        reader.read(at, out);
        all = all && std::equal(out.begin(), out.end(), content.begin() + static_cast<std::ptrdiff_t>(at));
      }
      same[t] = all;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const bool all : same) EXPECT_TRUE(all);
}

}  // namespace
}  // namespace nb::io
