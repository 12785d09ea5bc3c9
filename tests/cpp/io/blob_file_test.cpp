// blob_file.cpp: what is read is what was written, and damage is found and mended. Who makes it: blob_cache_test.cpp.
#include "io/blob_file.h"

#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <thread>

#include "io/blob_fixture.h"
#include "io/expect_error.h"

namespace nb::io {
namespace {

using test::Blob;
using test::expect_error;
using test::read;
using test::spec_of;

class BlobFileTest : public test::BlobFolder {};

TEST_F(BlobFileTest, GivesBackWhatWasWritten) {
  const auto file = open();
  expect_good(*file);
  EXPECT_EQ(file->file_bytes(), spec_of(blobs_).file_bytes());
  EXPECT_EQ(std::filesystem::file_size(path_), file->file_bytes());
  expect_good(*open());
  EXPECT_EQ(num_made_, 1);
}

TEST_F(BlobFileTest, ReadsPastThePageCacheWhereThatIsPossible) {
  const auto file = open();
  struct statfs facts {};
  ASSERT_EQ(::statfs(dir_.path("").c_str(), &facts), 0);
  constexpr auto kExt = 0xEF53, kXfs = 0x58465342;
  EXPECT_TRUE(file->is_direct() || (facts.f_type != kExt && facts.f_type != kXfs));
  // A file system without: memory. Tests elsewhere do not depend on which it is.
  if (!std::filesystem::exists("/dev/shm")) GTEST_SKIP() << "no file system in memory";
  path_ = "/dev/shm/nanobraid-test-" + std::to_string(::getpid()) + ".blobs";
  const auto other = open();
  expect_good(*other);
  std::filesystem::remove(path_);
  std::filesystem::remove(path_ + ".lock");
}

TEST_F(BlobFileTest, ADamagedBlobIsFoundAndMended) {
  const auto file = open();
  const auto third = 4096 + 4096 + 4096;
  change(third + (2 << 20), 'x');
  EXPECT_EQ(read(*file, 1, blobs_[1].size()), blobs_[1]);
  expect_error(
      ErrorCode::format, [&] { read(*file, 2, blobs_[2].size()); }, path_, "blob 2");
  Blob other = blobs_[2];
  other.back() ^= std::byte{1};
  expect_error(
      ErrorCode::format, [&] { file->mend(2, other); }, path_, "blob 2", "something else");
  expect_error(
      ErrorCode::format, [&] { file->check(2, blobs_[1]); }, path_, "blob 2");
  file->check(2, blobs_[2]);
  expect_error(
      ErrorCode::format, [&] { read(*file, 2, blobs_[2].size()); }, "blob 2");
  file->mend(2, blobs_[2]);
  expect_good(*file);
  expect_good(*open());
  EXPECT_EQ(num_made_, 1);
}

TEST_F(BlobFileTest, ARemovedFileIsReadOnAndMadeAgain) {
  const auto file = open();
  file->remove();
  EXPECT_FALSE(std::filesystem::exists(path_));
  expect_good(*file);
  file->mend(2, blobs_[2]);
  EXPECT_FALSE(std::filesystem::exists(path_));
  expect_good(*open());
  EXPECT_EQ(num_made_, 2);
}

TEST_F(BlobFileTest, AFileCutOffWhileItIsOpenIsAnError) {
  const auto file = open();
  std::filesystem::resize_file(path_, 4096 + 4096 + 4096 + (1 << 20));
  expect_error(
      ErrorCode::io, [&] { read(*file, 2, blobs_[2].size()); }, path_, "blob 2");
}

// One has the queue, the others read piece after piece.
TEST_F(BlobFileTest, ManyReadAtOnce) {
  const auto file = open();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 3; ++round) expect_good(*file);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace nb::io
