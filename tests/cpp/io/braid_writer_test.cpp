#include "io/braid_writer.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "io/braid_builder.h"
#include "io/braid_file.h"
#include "io/expect_error.h"
#include "io/peak_memory.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using quant::Format;
using test::Bytes;
using test::expect_error;

MetadataWriter small_metadata() {
  MetadataWriter metadata;
  metadata.string("general.architecture", "llama");
  metadata.u32("a.u32", 4000000000u);
  metadata.f32("a.f32", 1.5f);
  metadata.boolean("a.true", true);
  return metadata;
}

std::vector<BraidTensorSpec> small_tensors() {
  return {{"norm", Format::f32, {8}}, {"matrix", Format::q4_0, {3, 32}}, {"cube", Format::f16, {2, 3, 2}}};
}

Bytes data_of(std::size_t tensor, std::size_t size) {
  Bytes data;
  for (std::size_t i = 0; i < size; ++i) data.push_back(static_cast<std::byte>(tensor * 7 + i));
  return data;
}

Bytes content(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  return {bytes, bytes + text.size()};
}

std::size_t num_files(const std::string& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

class BraidWriterTest : public testing::Test {
 protected:
  test::ScratchDir dir_;
  std::string path_ = dir_.path("model.braid");
};

// The builder of the tests shares no code with the writer.
TEST_F(BraidWriterTest, WritesWhatTheBuilderBuilds) {
  BraidWriter writer(path_, small_metadata(), small_tensors());
  const std::size_t sizes[] = {32, 54, 24};
  for (std::size_t t = 0; t < 3; ++t) {
    const Bytes data = data_of(t, sizes[t]);
    for (std::size_t i = 0; i < data.size(); i += 5) {  // in pieces
      writer.write(t, std::span<const std::byte>(data).subspan(i).first(std::min<std::size_t>(5, data.size() - i)));
    }
  }
  EXPECT_FALSE(std::filesystem::exists(path_));
  EXPECT_EQ(num_files(dir_.path("")), 1u);
  EXPECT_FALSE(writer.is_finished());
  writer.finish();
  EXPECT_TRUE(writer.is_finished());
  EXPECT_EQ(num_files(dir_.path("")), 1u);

  test::BraidBuilder builder;
  builder.string("general.architecture", "llama").number<std::uint32_t>("a.u32", test::kU32, 4000000000u);
  builder.number<float>("a.f32", test::kF32, 1.5f).number<std::uint8_t>("a.true", test::kBool, 1);
  builder.tensor({.name = "norm", .format = 0, .dims = {8}, .bytes = 32})
      .tensor({.name = "matrix", .format = 16, .dims = {3, 32}, .bytes = 54})
      .tensor({.name = "cube", .format = 1, .dims = {2, 3, 2}, .bytes = 24});
  const Bytes wanted = builder.build().bytes, found = content(path_);
  EXPECT_EQ(found.size(), writer.file_bytes());
  EXPECT_TRUE(found == wanted);
  const BraidFile file(path_);
  file.verify();
}

TEST_F(BraidWriterTest, AFileOfNothing) {
  BraidWriter(path_, {}, {}).finish();
  const BraidFile file(path_);
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_TRUE(file.metadata().entries().empty());
  file.verify();
}

TEST_F(BraidWriterTest, WithoutFinishNothingIsLeft) {
  {
    BraidWriter writer(path_, small_metadata(), small_tensors());
    writer.write(0, data_of(0, 32));
    EXPECT_EQ(num_files(dir_.path("")), 1u);
  }
  EXPECT_EQ(num_files(dir_.path("")), 0u);
  BraidWriter writer(path_, small_metadata(), small_tensors());
  writer.abandon();
  EXPECT_EQ(num_files(dir_.path("")), 0u);
  expect_error(
      ErrorCode::invalid_argument, [&] { writer.write(0, data_of(0, 1)); }, path_, "closed");
  expect_error(
      ErrorCode::invalid_argument, [&] { writer.finish(); }, path_, "closed");
}

TEST_F(BraidWriterTest, TensorsComeInOrderEachWholeBeforeTheNext) {
  BraidWriter writer(path_, small_metadata(), small_tensors());
  const auto refuse = [](const auto& function, const auto&... pieces) {
    expect_error(ErrorCode::invalid_argument, function, pieces...);
  };
  refuse([&] { writer.write(1, data_of(1, 1)); }, "\"matrix\" cannot be written before \"norm\"");
  refuse([&] { writer.write(3, data_of(1, 1)); }, "no tensor 3 of 3");
  refuse([&] { writer.write(0, data_of(0, 33)); }, "\"norm\" has 32 bytes; 0 are written and 33 more");
  writer.write(0, {});
  const Bytes norm = data_of(0, 32);
  writer.write(0, std::span(norm).first(31));
  refuse([&] { writer.write(1, data_of(1, 1)); }, "before \"norm\" is complete");
  refuse([&] { writer.finish(); }, "\"norm\" is incomplete: 31 of 32 bytes");
  writer.write(0, std::span(norm).last(1));
  refuse([&] { writer.write(0, data_of(0, 1)); }, "32 are written and 1 more");
  writer.write(1, data_of(1, 54));
  refuse([&] { writer.finish(); }, "\"cube\" is incomplete: 0 of 24 bytes");
  writer.write(2, data_of(2, 24));
  writer.finish();  // what was refused has changed nothing
  BraidFile(path_).verify();
}

TEST_F(BraidWriterTest, ReplacesAFileInOneStep) {
  dir_.write("model.braid", data_of(0, 10));
  BraidWriter writer(path_, {}, {{"a", Format::f32, {1}}});
  writer.write(0, data_of(0, 4));
  EXPECT_EQ(content(path_).size(), 10u);
  writer.finish();
  EXPECT_EQ(content(path_).size(), 8192u);
  EXPECT_EQ(num_files(dir_.path("")), 1u);
}

TEST_F(BraidWriterTest, TwoWritersOfOneFile) {
  BraidWriter first(path_, {}, {{"a", Format::f32, {1}}}), second(path_, {}, {{"b", Format::f32, {1}}});
  EXPECT_NE(first.temporary_path(), second.temporary_path());
  first.write(0, data_of(0, 4));
  second.write(0, data_of(0, 4));
  second.finish();
  first.finish();
  EXPECT_EQ(BraidFile(path_).tensors()[0].name, "a");
}

TEST_F(BraidWriterTest, WhereNoFileCanBe) {
  const auto open = [](const std::string& path) { return [path] { BraidWriter(path, {}, {}); }; };
  expect_error(ErrorCode::io, open(dir_.path("absent/model.braid")), dir_.path("absent/model.braid"), "cannot create");
  dir_.write("file", data_of(0, 1));
  expect_error(ErrorCode::io, open(dir_.path("file/model.braid")), "cannot create");
  expect_error(ErrorCode::invalid_argument, open(""), "the path");
  expect_error(ErrorCode::invalid_argument, open(std::string("a\0b", 3)), "the path");
  std::filesystem::create_directory(dir_.path("folder"));
  BraidWriter writer(dir_.path("folder"), {}, {});
  expect_error(
      ErrorCode::io, [&] { writer.finish(); }, dir_.path("folder"), "cannot rename");
  writer.abandon();
  EXPECT_EQ(num_files(dir_.path("")), 2u);
}

TEST_F(BraidWriterTest, AFolderWithoutPermission) {
  std::filesystem::permissions(dir_.path(""), std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  const bool is_root = ::geteuid() == 0;  // root may write anywhere
  if (is_root) {
    ASSERT_EQ(::chown(dir_.path("").c_str(), 65534, 65534), 0);
    ASSERT_EQ(::seteuid(65534), 0);
  }
  expect_error(
      ErrorCode::io, [&] { BraidWriter(path_, {}, {}); }, path_, "ermission denied");
  if (is_root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
  std::filesystem::permissions(dir_.path(""), std::filesystem::perms::owner_all);
}

// A limit on the size of files stands for a full disk: in another process, since it cannot be lifted again.
TEST_F(BraidWriterTest, NoRoomIsSaidAtTheStart) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1 << 20, 1 << 20};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int result = 1;
    try {
      BraidWriter(path_, {}, {{"large", Format::f32, {1 << 20}}});
    } catch (const Error& error) {
      const std::string message = error.what();
      const bool is_clear = message.find(path_) == 0 && message.find("no room for 4198400 bytes") != std::string::npos;
      result = error.code() == ErrorCode::io && is_clear ? 0 : 2;
    }
    ::_exit(result == 0 && num_files(dir_.path("")) != 0 ? 3 : result);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST_F(BraidWriterTest, HoldsNoTensorData) {
  constexpr std::size_t kSize = 32 << 20;
  const Bytes piece(1 << 20);
  const std::size_t peak = test::peak_of([&] {
    BraidWriter writer(path_, {}, {{"large", Format::f32, {static_cast<std::int64_t>(kSize / 4)}}});
    for (std::size_t done = 0; done < kSize; done += piece.size()) writer.write(0, piece);
    writer.finish();
  });
  EXPECT_LT(peak, 256u << 10);
  EXPECT_EQ(std::filesystem::file_size(path_), kSize + 4096);
}

TEST_F(BraidWriterTest, RefusesTensorsThatNoReaderTakes) {
  const auto refuse = [&](std::vector<BraidTensorSpec> tensors, const auto&... pieces) {
    expect_error(
        ErrorCode::invalid_argument, [&] { BraidWriter(path_, {}, tensors); }, path_, pieces...);
    EXPECT_EQ(num_files(dir_.path("")), 0u);
  };
  refuse({{"", Format::f32, {1}}}, "name of tensor 0 is empty");
  refuse({{std::string(65, 'n'), Format::f32, {1}}}, "65 bytes, more than 64");
  refuse({{"\xff", Format::f32, {1}}}, "not UTF-8");
  refuse({{"a", Format::f32, {1}}, {"a", Format::f16, {1}}}, "\"a\" occurs twice");
  refuse({{"a", Format::f32, {}}}, "0 dimensions");
  refuse({{"a", Format::f32, {1, 1, 1, 1, 1}}}, "5 dimensions");
  refuse({{"a", Format::f32, {4, 0}}}, "dimension of 0");
  refuse({{"a", Format::f32, {-4, -4}}}, "dimension of -4");
  refuse({{"a", Format::f32, {INT64_MAX, INT64_MAX}}}, "dimension of");
  refuse({{"a", Format::q8_0, {2, 40}}}, "\"a\"", "q8_0 blocks of 32");
  refuse({{"a", Format::f32, {std::int64_t{1} << 60}}}, "\"a\"", "larger than a file");
  refuse(std::vector<BraidTensorSpec>(65537, {"a", Format::f32, {1}}), "65537 tensors");
  expect_error(
      ErrorCode::io,
      [&] {
        BraidWriter(path_, {}, {{"a", Format::f32, {std::int64_t{1} << 59}}});
      },
      path_, "no room");
  EXPECT_EQ(num_files(dir_.path("")), 0u);
}

}  // namespace
}  // namespace nb::io
