// blob_file.cpp: what is read is what was written, and a file that is damaged, cut off or another's is made again.
#include "io/blob_file.h"

#include <gtest/gtest.h>

#include <sys/statfs.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "io/expect_error.h"
#include "io/scratch_file.h"
#include "tensor/allocator.h"

namespace nb::io {
namespace {

using test::expect_error;
using test::ScratchDir;

using Blob = std::vector<std::byte>;

std::vector<Blob> random_blobs() {
  std::mt19937 random(7);
  std::vector<Blob> blobs;
  for (const std::size_t bytes : {5u, 4096u, 3u << 20, 4097u, 1u, 12'345u, (21u << 20) + 17}) {
    Blob& blob = blobs.emplace_back(bytes);
    for (std::byte& byte : blob) byte = static_cast<std::byte>(random());
  }
  return blobs;
}

BlobFileSpec spec_of(const std::vector<Blob>& blobs, int identity = 1) {
  BlobFileSpec spec;
  spec.identity[31] = static_cast<std::byte>(identity);
  for (const Blob& blob : blobs) spec.blob_bytes.push_back(blob.size());
  return spec;
}

Blob read(const BlobFile& file, int index, std::size_t bytes) {
  const auto arena = HostArena::create(1);
  const Buffer memory = arena->allocate(static_cast<std::size_t>(blob_room(bytes)), kBlobAlignment);
  file.read(index, {memory.data(), memory.bytes()});
  return {memory.data(), memory.data() + bytes};
}

class BlobFileTest : public testing::Test {
 protected:
  // Opens the file, and counts how often it had to be made.
  std::shared_ptr<const BlobFile> open(int identity = 1) {
    return open_or_make(path_, spec_of(blobs_, identity), [&](BlobWriter& writer) {
      ++num_made_;
      for (const Blob& blob : blobs_) writer.write(blob);
    });
  }

  void expect_good(const BlobFile& file) const {
    for (std::size_t i = blobs_.size(); i-- > 0;) {
      EXPECT_EQ(read(file, static_cast<int>(i), blobs_[i].size()), blobs_[i]) << i;
    }
  }

  void change(std::uint64_t offset, char value) const {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(value);
  }

  ScratchDir dir_;
  std::string path_ = dir_.path("a.blobs");
  std::vector<Blob> blobs_ = random_blobs();
  std::atomic<int> num_made_ = 0;
};

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

TEST_F(BlobFileTest, IsMadeAgainWhenItIsNotTheOne) {
  open();
  expect_good(*open(2));  // made from something else
  EXPECT_EQ(num_made_, 2);
  change(60, 'x');  // in the directory
  expect_good(*open(2));
  EXPECT_EQ(num_made_, 3);
  std::filesystem::resize_file(path_, spec_of(blobs_).file_bytes() - 4096);
  expect_good(*open(2));
  EXPECT_EQ(num_made_, 4);
  std::filesystem::resize_file(path_, 20);
  expect_good(*open(2));
  EXPECT_EQ(num_made_, 5);
  blobs_.pop_back();
  expect_good(*open(2));
  EXPECT_EQ(num_made_, 6);
}

TEST_F(BlobFileTest, ADamagedBlobIsFoundAndTheFileRemoved) {
  open();
  const auto file = open();
  change(4096 + 4096 + 4096 + (2 << 20), 'x');  // in the third blob
  EXPECT_EQ(read(*file, 1, blobs_[1].size()), blobs_[1]);
  expect_error(
      ErrorCode::format, [&] { read(*file, 2, blobs_[2].size()); }, path_, "blob 2");
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

TEST_F(BlobFileTest, AnErrorWhileItIsMadeLeavesNothing) {
  const auto make = [&] {
    open_or_make(path_, spec_of(blobs_), [&](BlobWriter& writer) {
      writer.write(blobs_[0]);
      throw Error(ErrorCode::unsupported, "no more");
    });
  };
  expect_error(ErrorCode::unsupported, make, "no more");
  EXPECT_FALSE(std::filesystem::exists(path_));
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir_.path(""))) files += entry.path() != path_ + ".lock";
  EXPECT_EQ(files, 0u);
}

TEST_F(BlobFileTest, WhatAKilledWriterLeftIsRemoved) {
  dir_.write(".a.blobs-123-0.tmp", blobs_[0]);
  dir_.write(".b.blobs-123-0.tmp", blobs_[0]);
  open();
  EXPECT_FALSE(std::filesystem::exists(dir_.path(".a.blobs-123-0.tmp")));
  EXPECT_TRUE(std::filesystem::exists(dir_.path(".b.blobs-123-0.tmp")));  // another file's
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

TEST_F(BlobFileTest, OfManyOneMakesIt) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this] { expect_good(*open()); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_made_, 1);
}

}  // namespace
}  // namespace nb::io
