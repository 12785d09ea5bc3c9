#include "io/braid_source.h"

#include <gtest/gtest.h>

#include "io/braid_builder.h"
#include "io/expect_error.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;

TEST(BraidSource, ShowsTensorsAndReadsThem) {
  const test::BraidImage image = test::small_braid().build();
  const auto source = open_braid(std::make_shared<const BraidFile>(image.bytes, "memory"));
  EXPECT_EQ(source->kind(), FileKind::braid);
  EXPECT_STREQ(to_string(source->kind()), "braid");
  EXPECT_EQ(source->version(), 1u);
  EXPECT_EQ(source->path(), "memory");
  EXPECT_EQ(source->file_bytes(), image.bytes.size());
  ASSERT_EQ(source->tensors().size(), 4u);
  const TensorInfo* matrix = source->find("matrix");
  ASSERT_NE(matrix, nullptr);
  EXPECT_EQ(matrix, &source->tensors()[1]);
  EXPECT_EQ(matrix->format, quant::Format::q4_0);
  EXPECT_EQ(matrix->format_name, "q4_0");
  EXPECT_EQ(matrix->shape, (std::vector<std::int64_t>{3, 32})) << "outermost first, as in the file";
  EXPECT_EQ(matrix->bytes, 54u);
  EXPECT_EQ(source->find("absent"), nullptr);
  test::Bytes out(18);
  source->read(*matrix, 36, out);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], static_cast<std::byte>(7 + 36 + i)) << i;
  expect_error(
      ErrorCode::invalid_argument, [&] { source->read(*matrix, 37, out); }, "18 bytes at offset 37", "\"matrix\"");
  expect_error(
      ErrorCode::invalid_argument, [&] { source->read(*matrix, ~std::uint64_t{0}, out); }, "\"matrix\"");
}

TEST(BraidSource, ReservedFormatsAreListedAndRefusedByName) {
  const test::BraidImage image = test::small_braid().build();
  const auto source = open_braid(std::make_shared<const BraidFile>(image.bytes, "memory"));
  EXPECT_EQ(source->tensors()[3].format, std::nullopt);
  EXPECT_EQ(source->tensors()[3].format_name, "fp8_e5m2");
  expect_error(
      ErrorCode::unsupported, [&] { static_cast<void>(source->find("later")); }, "memory", "\"later\"", "fp8_e5m2");
}

TEST(BraidSource, KnowsSectionsFingerprintAndChecksums) {
  test::BraidImage image = test::small_braid().build();
  const auto source = open_braid(std::make_shared<const BraidFile>(image.bytes, "memory"));
  EXPECT_EQ(source->fingerprint().size(), 64u);
  const std::vector<SectionInfo> sections = source->sections();
  ASSERT_EQ(sections.size(), 3u);
  EXPECT_EQ(sections[2].name, "DATA");
  EXPECT_EQ(sections[2].offset, image.data);
  EXPECT_EQ(sections[2].bytes, image.bytes.size() - image.data);
  EXPECT_TRUE(source->verify());
  image.put<std::uint8_t>(image.data, 0x55);
  expect_error(
      ErrorCode::format, [&] { source->verify(); }, "\"norm\"");
}

TEST(BraidSource, KeepsTheFileAlive) {
  const test::ScratchDir dir;
  auto file = std::make_shared<const BraidFile>(dir.write("model.braid", test::small_braid().build().bytes));
  const auto source = open_braid(file);
  file.reset();
  EXPECT_EQ(source->metadata().string("general.architecture"), "llama");
  EXPECT_TRUE(source->verify());
}

}  // namespace
}  // namespace nb::io
