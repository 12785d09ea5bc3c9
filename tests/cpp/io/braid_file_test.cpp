#include "io/braid_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>

#include "io/braid_builder.h"
#include "io/expect_error.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::BraidImage;
using test::expect_error;

void check_small(const BraidFile& file, const BraidImage& image) {
  EXPECT_EQ(file.version(), 1u);
  EXPECT_EQ(file.file_bytes(), image.bytes.size());
  EXPECT_EQ(file.metadata().string("general.architecture"), "llama");
  EXPECT_EQ(file.metadata().path(), file.path());
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.find_tensor("cube"), &file.tensors()[2]);
  EXPECT_EQ(file.find_tensor("cub"), nullptr);
  EXPECT_TRUE(std::equal(file.fingerprint().begin(), file.fingerprint().end(), image.bytes.begin() + 40));
  test::Bytes out(10);
  file.read(file.find_tensor("cube")->offset + 3, out);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], static_cast<std::byte>(14 + 3 + i));
  file.verify();
  expect_error(
      ErrorCode::io, [&] { file.read(image.bytes.size() - 9, out); }, file.path(), "10 bytes at offset");
  expect_error(
      ErrorCode::io, [&] { file.read(~std::uint64_t{0}, out); }, file.path());
}

TEST(BraidFile, FromAFileAndFromMemory) {
  const test::ScratchDir dir;
  const BraidImage image = test::small_braid().build();
  const std::string path = dir.write("model.braid", image.bytes);
  const BraidFile mapped(path), in_memory(image.bytes, "memory");
  check_small(mapped, image);
  check_small(in_memory, image);
  EXPECT_EQ(mapped.path(), path);
  expect_error(
      ErrorCode::io, [&] { BraidFile(dir.path("absent")); }, "absent");
}

TEST(BraidFile, VerifyNamesTheTensorThatIsDamaged) {
  const BraidImage image = test::small_braid().build();
  const BraidFile whole(image.bytes, "whole");
  for (const BraidTensor& tensor : whole.tensors()) {
    for (std::uint64_t i = 0; i < tensor.bytes; ++i) {
      test::Bytes flipped = image.bytes;
      flipped[tensor.offset + i] ^= std::byte{0x10};
      const BraidFile file(flipped, "flipped");  // opening reads no tensor
      expect_error(
          ErrorCode::format, [&] { file.verify(); }, "flipped: at offset " + std::to_string(tensor.offset),
          "tensor \"" + std::string(tensor.name) + "\" does not have its checksum");
    }
  }
}

TEST(BraidFile, VerifyFindsWhatStandsInPadding) {
  const BraidImage image = test::small_braid().build();
  for (const std::size_t at : {image.tensors + image.tensors_bytes, image.data - 1, image.data + 32, image.data + 4095,
                               image.bytes.size() - 1}) {
    test::Bytes changed = image.bytes;
    changed[at] = std::byte{1};
    const BraidFile file(changed, "padding");
    expect_error(
        ErrorCode::format, [&] { file.verify(); }, "at offset " + std::to_string(at) + ": padding is not 0");
  }
}

TEST(BraidFile, VerifyComparesTheFingerprint) {
  BraidImage image = test::small_braid().build();
  image.put<std::uint8_t>(50, 0x77).seal();
  expect_error(
      ErrorCode::format, [&] { BraidFile(image.bytes, "other").verify(); }, "offset 40", "the fingerprint is");
  // Contents that differ behind right checksums have another fingerprint.
  image = test::small_braid().build();
  image.put<std::uint32_t>(image.metadata + image.metadata_bytes - 30, 7);
  image.put(BraidImage::section(0) + 24, crc32c(image.part(image.metadata, image.metadata_bytes))).seal();
  const auto verify = [&] { BraidFile(image.bytes, "other").verify(); };
  EXPECT_THROW(verify(), Error);
}

TEST(BraidFile, VerifyComparesSectionsThatAreSkipped) {
  test::BraidBuilder builder;
  builder.spare_sections = 1;
  BraidImage image = builder.string("k", "v").build();
  const std::size_t at = BraidImage::section(3);
  // The end of METADATA, TENSORS and the padding behind it have sizes of their own; the last 8 bytes before DATA are
  // free.
  image.put<std::uint64_t>(image.data - 8, 0x1122334455667788).put<std::uint32_t>(at, 77).put<std::uint32_t>(at + 4, 1);
  image.put<std::uint64_t>(at + 8, image.data - 8).put<std::uint64_t>(at + 16, 8);
  image.put(at + 24, crc32c(image.part(image.data - 8, 8))).seal();
  BraidFile(image.bytes, "skipped").verify();
  image.put<std::uint8_t>(image.data - 5, 0);
  expect_error(
      ErrorCode::format, [&] { BraidFile(image.bytes, "skipped").verify(); }, "section kind 77", "checksum");
}

TEST(BraidFile, VerifySaysHowFarItIs) {
  test::BraidBuilder builder;
  builder.tensor({.name = "large", .dims = {700000}, .bytes = 2800000});
  const BraidImage image = builder.build();
  const BraidFile file(image.bytes, "large");
  std::vector<std::uint64_t> done;
  file.verify([&](std::uint64_t bytes, std::uint64_t all) {
    EXPECT_EQ(all, image.bytes.size());
    done.push_back(bytes);
  });
  EXPECT_GE(done.size(), 4u);
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(done.back(), image.bytes.size());
  EXPECT_THROW(file.verify([](std::uint64_t, std::uint64_t) { fail(ErrorCode::internal, "enough"); }), Error);
}

TEST(BraidFile, AFileThatIsCutWhileOpenIsAnErrorOfReading) {
  const test::ScratchDir dir;
  const BraidImage image = test::small_braid().build();
  const std::string path = dir.write("model.braid", image.bytes);
  const BraidFile file(path);
  ASSERT_EQ(::truncate(path.c_str(), static_cast<off_t>(image.data + 4096)), 0);
  expect_error(
      ErrorCode::io, [&] { file.verify(); }, path, "the file ends after");
}

}  // namespace
}  // namespace nb::io
