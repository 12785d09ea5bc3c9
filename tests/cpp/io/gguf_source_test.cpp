#include "io/gguf_source.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <optional>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;

std::byte stored(std::size_t tensor, std::size_t index) { return static_cast<std::byte>(tensor * 7 + index); }

void check_source(const ModelSource& source) {
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

TEST(GgufSource, FromAFile) {
  const test::ScratchDir dir;
  const auto file = std::make_shared<const GgufFile>(dir.write("model.gguf", test::small_file().build()));
  check_source(*open_gguf(file));
}

TEST(GgufSource, FromMemory) {
  const test::Bytes bytes = test::small_file().build();
  check_source(*open_gguf(std::make_shared<const GgufFile>(bytes, "memory")));
}

TEST(GgufSource, KeepsTheFileAlive) {
  const test::ScratchDir dir;
  auto file = std::make_shared<const GgufFile>(dir.write("model.gguf", test::small_file().build()));
  const std::shared_ptr<const ModelSource> source = open_gguf(file);
  file.reset();
  check_source(*source);
}

TEST(GgufSource, ATruncatedFileIsAnErrorOfReading) {
  const test::ScratchDir dir;
  const std::string path = dir.write("model.gguf", test::small_file().build());
  const std::shared_ptr<const ModelSource> source = open_gguf(std::make_shared<const GgufFile>(path));
  const TensorInfo* matrix = source->find("matrix");
  ASSERT_EQ(::truncate(path.c_str(), static_cast<off_t>(matrix->offset + 10)), 0);
  test::Bytes out(matrix->bytes);
  expect_error(
      ErrorCode::io, [&] { source->read(*matrix, 0, out); }, path, "ends after 10");
}

// ---- models split over several files ----

struct PartSpec {
  std::optional<std::uint64_t> number, count, tensors;  // as the metadata say, counted from 0
  std::vector<std::string> names;
  std::string model = "one";
};

class SplitGguf : public testing::Test {
 protected:
  static std::string name(int part, int count) {
    const auto digits = [](int value) {
      return ("00000" + std::to_string(value)).substr(std::to_string(value).size());
    };
    return "model-" + digits(part) + "-of-" + digits(count) + ".gguf";
  }

  void write(const std::string& file, const PartSpec& spec) const {
    test::GgufBuilder builder;
    builder.string("general.name", spec.model);
    if (spec.number) builder.number("split.no", test::kU16, static_cast<std::uint16_t>(*spec.number));
    if (spec.count) builder.number("split.count", test::kU16, static_cast<std::uint16_t>(*spec.count));
    if (spec.tensors) builder.number("split.tensors.count", test::kI32, static_cast<std::int32_t>(*spec.tensors));
    for (const std::string& tensor : spec.names) builder.tensor({.name = tensor, .dims = {8}, .data_bytes = 32});
    dir_.write(file, builder.build());
  }

  void write_three() const {
    write(name(1, 3), {.number = 0, .count = 3, .tensors = 4, .names = {"b", "d"}});
    write(name(2, 3), {.number = 1, .count = 3, .tensors = 4, .names = {"a"}});
    write(name(3, 3), {.number = 2, .count = 3, .tensors = 4, .names = {"c"}});
  }

  std::function<void()> opening(const std::string& file) const {
    return [path = dir_.path(file)] { open_gguf(path); };
  }

  test::ScratchDir dir_;
};

TEST_F(SplitGguf, OpensFromAnyPart) {
  write_three();
  for (int part = 1; part <= 3; ++part) {
    const std::shared_ptr<const ModelSource> source = open_gguf(dir_.path(name(part, 3)));
    EXPECT_EQ(source->path(), dir_.path(name(1, 3)));
    ASSERT_EQ(source->parts().size(), 3u);
    EXPECT_EQ(source->parts()[2], dir_.path(name(3, 3)));
    EXPECT_EQ(source->metadata().u64("split.no"), 0u);
    ASSERT_EQ(source->tensors().size(), 4u);
    std::uint64_t bytes = 0;
    for (const std::string& path : source->parts()) bytes += GgufFile(path).file_bytes();
    EXPECT_EQ(source->file_bytes(), bytes);
    const std::pair<const char*, std::size_t> places[] = {{"a", 0}, {"b", 0}, {"c", 0}, {"d", 1}};  // within its part
    for (const auto& [tensor, place] : places) {
      const TensorInfo* info = source->find(tensor);
      ASSERT_NE(info, nullptr) << tensor;
      test::Bytes out(20);
      source->read(*info, 12, out);
      for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], stored(place, 12 + i)) << tensor;
    }
    EXPECT_EQ(source->find("e"), nullptr);
  }
}

TEST_F(SplitGguf, AMissingPartIsNamed) {
  write_three();
  std::filesystem::remove(dir_.path(name(1, 3)));
  expect_error(ErrorCode::io, opening(name(2, 3)), dir_.path(name(1, 3)) + ": cannot open", "part 1 of 3", name(2, 3));
  write_three();
  std::filesystem::remove(dir_.path(name(3, 3)));
  expect_error(ErrorCode::io, opening(name(1, 3)), dir_.path(name(3, 3)) + ": cannot open", "part 3 of 3");
}

TEST_F(SplitGguf, APartUnderAnotherName) {
  write_three();
  std::filesystem::rename(dir_.path(name(2, 3)), dir_.path("second.gguf"));
  expect_error(ErrorCode::format, opening("second.gguf"), "second.gguf: is part 2 of 3", "-00002-of-00003.gguf");
  write_three();
  std::filesystem::copy(dir_.path(name(1, 3)), dir_.path(name(2, 3)),
                        std::filesystem::copy_options::overwrite_existing);
  expect_error(ErrorCode::format, opening(name(1, 3)), dir_.path(name(2, 3)) + ": is part 1 of 3 by its metadata",
               "part 2 of 3 by its name");
}

TEST_F(SplitGguf, PartsOfDifferentModels) {
  write_three();
  write(name(2, 3), {.number = 1, .count = 3, .tensors = 9, .names = {"a"}});
  expect_error(ErrorCode::format, opening(name(1, 3)), name(2, 3), "a model of 9 tensors", "one of 4");
  write(name(2, 3), {.number = 1, .count = 2, .tensors = 4, .names = {"a"}});
  expect_error(ErrorCode::format, opening(name(1, 3)), name(2, 3), "part 2 of 2 by its metadata");
  write(name(2, 3), {.number = 1, .count = 3, .tensors = 4, .names = {"a"}, .model = "two"});
  expect_error(ErrorCode::format, opening(name(3, 3)), name(2, 3), "general.name", "\"two\"", "\"one\"",
               "different models");
}

TEST_F(SplitGguf, WrongNumbers) {
  write_three();
  write(name(3, 3), {.number = 2, .count = 3, .tensors = 4, .names = {}});
  expect_error(ErrorCode::format, opening(name(1, 3)), name(1, 3), "hold 3 tensors", "split.tensors.count is 4");
  write(name(3, 3), {.number = 2, .count = 3, .tensors = 4, .names = {"d"}});
  expect_error(ErrorCode::format, opening(name(1, 3)), "tensor \"d\" stands in another part");
  write(name(3, 3), {.number = 3, .count = 3, .tensors = 4, .names = {"c"}});
  expect_error(ErrorCode::format, opening(name(3, 3)), "split.no is 3", "3 parts");
  write(name(3, 3), {.number = {}, .count = 3, .tensors = 4, .names = {"c"}});
  expect_error(ErrorCode::format, opening(name(3, 3)), name(3, 3), "split.no", "missing");
  write(name(3, 3), {.number = 2, .count = 3, .tensors = {}, .names = {"c"}});
  expect_error(ErrorCode::format, opening(name(1, 3)), name(3, 3), "split.tensors.count", "missing");
  write("whole.gguf", {.number = 0, .count = 1, .tensors = 4, .names = {"c"}});
  EXPECT_EQ(open_gguf(dir_.path("whole.gguf"))->parts().size(), 1u);
}

TEST_F(SplitGguf, MemoryHoldsOnlyWholeModels) {
  write_three();
  expect_error(
      ErrorCode::unsupported, [&] { open_gguf(std::make_shared<const GgufFile>(dir_.path(name(1, 3)))); }, name(1, 3),
      "one of the 3 parts");
}

TEST(GgufSource, FormatOfType) {
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
