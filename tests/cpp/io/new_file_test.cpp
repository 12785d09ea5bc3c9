// new_file.cpp; what a writer makes of it is in braid_writer_test.cpp and blob_file_test.cpp.
#include "io/new_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "io/expect_error.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;
using test::ScratchDir;

std::string content(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

TEST(NewFile, AppearsWhenItIsPublished) {
  const ScratchDir dir;
  const std::string path = dir.path("it");
  dir.write("it", bytes_of("old"));
  NewFile file(path, "kind", 8);
  EXPECT_NE(file.temporary_path().find("/.kind-"), std::string::npos);
  EXPECT_EQ(std::filesystem::file_size(file.temporary_path()), 8u);  // its room is taken at once
  file.write_at(4, bytes_of("last"));
  file.write_at(0, bytes_of("head"));
  EXPECT_EQ(content(path), "old");
  file.publish();
  EXPECT_EQ(content(path), "headlast");
  EXPECT_FALSE(std::filesystem::exists(file.temporary_path()));
}

TEST(NewFile, LeavesNothingOtherwise) {
  const ScratchDir dir;
  std::string temporary;
  {
    NewFile file(dir.path("it"), "kind", 8);
    temporary = file.temporary_path();
    EXPECT_TRUE(std::filesystem::exists(temporary));
  }
  EXPECT_FALSE(std::filesystem::exists(temporary));
  EXPECT_FALSE(std::filesystem::exists(dir.path("it")));
}

TEST(NewFile, NamesThePathOfWhatFails) {
  const ScratchDir dir;
  expect_error(
      ErrorCode::io, [&] { NewFile(dir.path("absent/it"), "kind", 8); }, "absent/it", "cannot create");
  expect_error(
      ErrorCode::io, [&] { NewFile(dir.path("it"), "kind", std::uint64_t{1} << 60); }, "it", "no room");
  EXPECT_TRUE(std::filesystem::is_empty(dir.path("")));
}

TEST(FolderOf, IsWhatStandsBeforeTheName) {
  EXPECT_EQ(folder_of("a/b/c"), "a/b");
  EXPECT_EQ(folder_of("/c"), "/");
  EXPECT_EQ(folder_of("c"), ".");
}

}  // namespace
}  // namespace nb::io
