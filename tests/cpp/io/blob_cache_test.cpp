// blob_cache.cpp: one makes a file and others wait, a wrong one is made again, and a limit is held.
#include "io/blob_cache.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "io/blob_fixture.h"
#include "io/expect_error.h"

namespace nb::io {
namespace {

using test::expect_error;
using test::spec_of;

namespace fs = std::filesystem;

class BlobCache : public test::BlobFolder {
 protected:
  std::uint64_t size() const { return spec_of(blobs_).file_bytes(); }

  // Opens a file of that name in the folder, as large as the others.
  std::shared_ptr<const BlobFile> open_named(const std::string& name, std::uint64_t limit = 0) {
    path_ = dir_.path(name + ".blobs");
    return open(1, {.bytes = limit, .name = "the limit"});
  }

  // Names of the files that are there, in order.
  std::string names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(dir_.path(""))) {
      if (entry.path().extension() == ".blobs") out.push_back(entry.path().stem().string());
    }
    std::sort(out.begin(), out.end());
    std::string joined;
    for (const std::string& name : out) joined += name;
    return joined;
  }
};

TEST_F(BlobCache, IsMadeAgainWhenItIsNotTheOne) {
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

TEST_F(BlobCache, AnErrorWhileItIsMadeLeavesNothing) {
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

TEST_F(BlobCache, WhatAKilledWriterLeftIsRemoved) {
  dir_.write(".a.blobs-123-0.tmp", blobs_[0]);
  dir_.write(".b.blobs-123-0.tmp", blobs_[0]);
  open();
  EXPECT_FALSE(std::filesystem::exists(dir_.path(".a.blobs-123-0.tmp")));
  EXPECT_TRUE(std::filesystem::exists(dir_.path(".b.blobs-123-0.tmp")));  // another file's
}

TEST_F(BlobCache, OfManyOneMakesIt) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this] { expect_good(*open()); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_made_, 1);
}

TEST_F(BlobCache, TheOneThatWasOpenedLongestAgoMakesRoom) {
  for (const char* name : {"a", "b", "c"}) open_named(name);
  open_named("a");  // the last one that was used
  EXPECT_EQ(names(), "abc");
  open_named("d", 3 * size());
  EXPECT_EQ(names(), "acd");
  EXPECT_FALSE(fs::exists(dir_.path("b.blobs.lock")));
  open_named("a", 2 * size() - 1);  // which is there: the others go all the same
  EXPECT_EQ(names(), "a");
  EXPECT_EQ(num_made_, 4);
}

TEST_F(BlobCache, ALimitIsExact) {
  for (const char* name : {"a", "b"}) open_named(name);
  open_named("c", 3 * size());
  EXPECT_EQ(names(), "abc");
  open_named("c", 3 * size() - 1);
  EXPECT_EQ(names(), "bc");
  expect_error(
      ErrorCode::invalid_argument, [&] { open_named("d", size() - 1); }, "the limit is", std::to_string(size()));
  EXPECT_EQ(names(), "bc");
  open_named("d", size());
  EXPECT_EQ(names(), "d");
}

TEST_F(BlobCache, AFileThatIsOpenNeverGoes) {
  const auto a = open_named("a");
  open_named("b");
  open_named("c", 2 * size());
  EXPECT_EQ(names(), "ac");
  const auto c = open_named("c");
  expect_error(
      ErrorCode::invalid_argument, [&] { open_named("d", 3 * size() - 1); }, "the limit is", "d.blobs", "in use",
      std::to_string(2 * size()));
  EXPECT_EQ(names(), "ac");
  expect_good(*a);
  open_named("c", size());  // is there: nothing grows
  EXPECT_EQ(names(), "ac");
}

TEST_F(BlobCache, OtherFilesCountForNothingAndStay) {
  dir_.write("large.other", std::vector<std::byte>(1000));
  dir_.write(".hidden.blobs", std::vector<std::byte>(1000));
  open_named("a", size());
  open_named("b", size());
  EXPECT_EQ(names(), ".hiddenb");
  EXPECT_TRUE(fs::exists(dir_.path("large.other")));
}

TEST_F(BlobCache, WhatIsBeingMadeCountsAndWhatAKilledWriterLeftGoes) {
  const std::uint64_t limit = 2 * size();
  fs::resize_file(dir_.write(".killed.blobs-123-0.tmp", blobs_[0]), size() + 1);
  open_named("a", limit);
  EXPECT_FALSE(fs::exists(dir_.path(".killed.blobs-123-0.tmp")));
  const auto a = open_named("a", limit);
  open_or_make(dir_.path("b.blobs"), spec_of(blobs_),
               [&](BlobWriter& writer) {
                 path_ = dir_.path("c.blobs");
                 expect_error(
                     ErrorCode::invalid_argument, [&] { open(1, {.bytes = limit, .name = "the limit"}); }, "in use",
                     std::to_string(limit));
                 for (const test::Blob& blob : blobs_) writer.write(blob);
               },
               {.bytes = limit, .name = "the limit"});
  EXPECT_EQ(names(), "ab");
}

TEST_F(BlobCache, WithoutRoomOnTheDiskThereIsAnErrorAndNothingIsLeft) {
  BlobFileSpec spec;
  spec.blob_bytes = {std::uint64_t{1} << 60};
  expect_error(
      ErrorCode::io, [&] { open_or_make(path_, spec, [](BlobWriter&) { FAIL(); }); }, path_, "no room for");
  EXPECT_EQ(names(), "");
  for (const auto& entry : fs::directory_iterator(dir_.path(""))) EXPECT_EQ(entry.path(), path_ + ".lock");
}

TEST_F(BlobCache, ManyWithALimitNeitherFailNorExceedIt) {
  std::vector<std::thread> threads;
  const BlobLimit limit{.bytes = 8 * size(), .name = "the limit"};
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this, i, &limit] {
      const std::string path = dir_.path(std::to_string(i % 4) + ".blobs");
      for (int round = 0; round < 3; ++round) {
        expect_good(*open_or_make(
            path, spec_of(blobs_),
            [&](BlobWriter& writer) {
              for (const test::Blob& blob : blobs_) writer.write(blob);
            },
            limit));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(names(), "0123");
}

}  // namespace
}  // namespace nb::io
