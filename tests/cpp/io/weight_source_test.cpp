#include "io/weight_source.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;

std::byte stored(std::size_t tensor, std::size_t index) { return static_cast<std::byte>(tensor * 7 + index); }

void check_source(const WeightSource& source) {
  const TensorInfo* matrix = source.find("matrix");
  ASSERT_NE(matrix, nullptr);
  EXPECT_EQ(matrix->name, "matrix");
  EXPECT_EQ(matrix->format, quant::Format::q4_0);
  EXPECT_EQ(matrix->shape, (std::vector<std::int64_t>{3, 32}));
  EXPECT_EQ(matrix->bytes, 54u);
  EXPECT_EQ(source.find("matrix"), matrix);

  const TensorInfo* cube = source.find("cube");
  ASSERT_NE(cube, nullptr);
  EXPECT_EQ(cube->format, quant::Format::f16);
  EXPECT_EQ(cube->shape, (std::vector<std::int64_t>{2, 3, 2}));
  ASSERT_NE(source.find("norm"), nullptr);
  EXPECT_EQ(source.find("norm")->shape, (std::vector<std::int64_t>{8}));
  EXPECT_EQ(source.find("absent"), nullptr);
  expect_error(
      ErrorCode::unsupported, [&] { static_cast<void>(source.find("k_quant")); }, "\"k_quant\"", "Q3_K");
  expect_error(
      ErrorCode::unsupported, [&] { static_cast<void>(source.find("odd")); }, "\"odd\"", "type 31");

  test::Bytes out(18);
  source.read(*matrix, 36, out);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], stored(1, 36 + i)) << i;
  out.resize(24);
  source.read(*cube, 0, out);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], stored(4, i)) << i;

  expect_error(
      ErrorCode::invalid_argument, [&] { source.read(*matrix, 36, out); }, "24 bytes at offset 36", "\"matrix\"");
  expect_error(
      ErrorCode::invalid_argument, [&] { source.read(*matrix, ~std::uint64_t{0}, out); }, "\"matrix\"");
}

TEST(WeightSource, FromAFile) {
  const test::ScratchDir dir;
  const auto file = std::make_shared<const GgufFile>(dir.write("model.gguf", test::small_file().build()));
  check_source(*open_gguf_weights(file));
}

TEST(WeightSource, FromMemory) {
  const test::Bytes bytes = test::small_file().build();
  check_source(*open_gguf_weights(std::make_shared<const GgufFile>(bytes, "memory")));
}

TEST(WeightSource, KeepsTheFileAlive) {
  const test::ScratchDir dir;
  auto file = std::make_shared<const GgufFile>(dir.write("model.gguf", test::small_file().build()));
  const std::unique_ptr<WeightSource> source = open_gguf_weights(file);
  file.reset();
  check_source(*source);
}

TEST(WeightSource, ATruncatedFileIsAnErrorOfReading) {
  const test::ScratchDir dir;
  const std::string path = dir.write("model.gguf", test::small_file().build());
  const std::unique_ptr<WeightSource> source = open_gguf_weights(std::make_shared<const GgufFile>(path));
  const TensorInfo* matrix = source->find("matrix");
  ASSERT_EQ(::truncate(path.c_str(), static_cast<off_t>(matrix->offset + 10)), 0);
  test::Bytes out(matrix->bytes);
  expect_error(
      ErrorCode::io, [&] { source->read(*matrix, 0, out); }, path, "ends after 10");
}

TEST(WeightSource, RefusesAPartOfASplitModel) {
  const auto open = [](std::uint16_t parts) {
    test::GgufBuilder builder = test::small_file();
    builder.number<std::uint16_t>("split.count", test::kU16, parts);
    const test::Bytes bytes = builder.build();
    open_gguf_weights(std::make_shared<const GgufFile>(bytes, "part"));
  };
  open(1);
  expect_error(
      ErrorCode::unsupported, [&] { open(3); }, "part", "split over 3 files");
}

TEST(WeightSource, FormatOfType) {
  EXPECT_EQ(format_of_gguf_type(3, "x"), quant::Format::q4_1);
  EXPECT_EQ(format_of_gguf_type(14, "x"), quant::Format::q6_k);
  const auto expect_refused = [](std::uint32_t type, const char* name) {
    expect_error(
        ErrorCode::unsupported, [&] { static_cast<void>(format_of_gguf_type(type, "x.weight")); }, "\"x.weight\"",
        name);
  };
  expect_refused(10, "Q2_K");
  expect_refused(11, "Q3_K");
  expect_refused(16, "IQ2_XXS");
  expect_refused(20, "IQ4_NL");
  expect_refused(23, "IQ4_XS");
  expect_refused(29, "IQ1_M");
  expect_refused(39, "MXFP4");
}

}  // namespace
}  // namespace nb::io
