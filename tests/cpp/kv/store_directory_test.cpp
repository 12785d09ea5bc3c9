#include "kv/store_directory.h"

#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <thread>

#include "kv/disk_scratch.h"

namespace nb::kv {
namespace {

bool everything(const std::string&) { return true; }

TEST(StoreDirectory, AFileIsReplacedWholeAndListedWithItsFacts) {
  const Scratch scratch;
  const StoreDirectory directory(scratch.store(), {});
  const std::vector<std::byte> one(5000, std::byte{1}), two(70, std::byte{2});
  EXPECT_EQ(
      directory.create("name", std::array{std::span<const std::byte>(one), std::span<const std::byte>(two)}, false), 0);
  int error = -1;
  const std::optional<StoreFile> before = directory.open("name", &error);
  ASSERT_TRUE(before);
  EXPECT_EQ(directory.create("name", std::array{std::span<const std::byte>(two)}, true), 0);
  // Who has it open keeps what it was.
  std::vector<std::byte> read(5070);
  EXPECT_EQ(before->read(0, read), 0);
  EXPECT_EQ(read[4999], std::byte{1});
  EXPECT_EQ(read[5000], std::byte{2});
  EXPECT_EQ(before->read(5069, std::span(read).first(2)), EOVERFLOW);
  const std::vector<ListedFile> files = directory.list(everything);
  ASSERT_EQ(files.size(), 1u);
  EXPECT_EQ(files[0].name, "name");
  EXPECT_EQ(files[0].bytes, 70);
  EXPECT_TRUE(files[0].pinned);
  EXPECT_FALSE(before->facts().pinned);
  EXPECT_TRUE(directory.exists("name"));
  EXPECT_TRUE(directory.remove("name"));
  EXPECT_FALSE(directory.remove("name"));
  EXPECT_FALSE(directory.exists("name"));
  EXPECT_FALSE(directory.open("name", &error));
  EXPECT_EQ(error, ENOENT);
}

TEST(StoreDirectory, TheTimeOfADirectoryIsNotTrustedWhileItMayStandStill) {
  const Scratch scratch;
  const StoreDirectory directory(scratch.store(), {});
  write_file(scratch.store() + "/one", "x");
  EXPECT_EQ(directory.modified_ns(), -1);
  std::this_thread::sleep_for(std::chrono::milliseconds(70));
  const std::int64_t before = directory.modified_ns();
  EXPECT_GT(before, 0);
  EXPECT_EQ(directory.modified_ns(), before);
  write_file(scratch.store() + "/two", "x");
  EXPECT_EQ(directory.modified_ns(), -1);
}

}  // namespace
}  // namespace nb::kv
