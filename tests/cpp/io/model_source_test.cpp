#include "io/model_source.h"

#include <gtest/gtest.h>

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
}

}  // namespace
}  // namespace nb::io
