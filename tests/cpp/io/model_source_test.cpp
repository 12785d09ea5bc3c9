#include "io/model_source.h"

#include <gtest/gtest.h>

#include "io/braid_builder.h"
#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;
using test::ScratchDir;

TEST(ModelSource, OpensByContent) {
  const ScratchDir dir;
  const std::string path = dir.write("model.of-any-name", test::small_file().build());
  const std::shared_ptr<const ModelSource> source = open_model(path);
  EXPECT_EQ(source->kind(), FileKind::gguf);
  EXPECT_STREQ(to_string(source->kind()), "GGUF");
  EXPECT_EQ(source->path(), path);
  EXPECT_EQ(source->version(), 3u);
  EXPECT_EQ(source->metadata().string("general.architecture"), "llama");
  EXPECT_EQ(source->tensors().size(), 5u);
}

TEST(ModelSource, OpensBraidByContent) {
  const ScratchDir dir;
  const std::string path = dir.write("model.gguf", test::small_braid().build().bytes);  // a name that misleads
  const std::shared_ptr<const ModelSource> source = open_model(path);
  EXPECT_EQ(source->kind(), FileKind::braid);
  EXPECT_EQ(source->path(), path);
  EXPECT_EQ(source->tensors().size(), 4u);
  EXPECT_EQ(source->fingerprint().size(), 64u);
}

TEST(ModelSource, OnlyBraidHasChecksums) {
  const ScratchDir dir;
  const std::shared_ptr<const ModelSource> gguf = open_model(dir.write("a", test::small_file().build()));
  EXPECT_FALSE(gguf->verify());
  EXPECT_EQ(gguf->fingerprint(), "");
  EXPECT_TRUE(gguf->sections().empty());
  EXPECT_TRUE(open_model(dir.write("b", test::small_braid().build().bytes))->verify());
}

TEST(ModelSource, RefusesWhatIsNoModel) {
  const ScratchDir dir;
  expect_error(
      ErrorCode::io, [&] { open_model(dir.path("absent.gguf")); }, "absent.gguf");
  const std::byte text[] = {std::byte{'h'}, std::byte{'e'}, std::byte{'l'}, std::byte{'l'}, std::byte{'o'}};
  expect_error(
      ErrorCode::format,
      [&] {
        open_model(dir.write("text.gguf", {text, text + 5}));
      },
      "text.gguf", "hell");
  expect_error(
      ErrorCode::format, [&] { open_model(dir.write("empty", {})); }, "empty");
  test::Bytes damaged = test::small_braid().build().bytes;
  damaged[6] = std::byte{'\n'};  // as a program does that changes line ends
  expect_error(
      ErrorCode::format, [&] { open_model(dir.write("damaged", damaged)); }, "not a .braid file");
}

}  // namespace
}  // namespace nb::io
