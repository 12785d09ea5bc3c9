// loader.cpp: what is refused by name, and what is said meanwhile.
#include "model/loader.h"

#include <gtest/gtest.h>

#include <chrono>

#include "base/log.h"
#include "io/expect_error.h"
#include "io/gguf_source.h"
#include "model/load_progress.h"
#include "model/naive_llama.h"

namespace nb::model {
namespace {

using io::test::expect_error;
using io::test::GgufBuilder;

TEST(LoadModel, NamesMissingAndMisshapenTensors) {
  const io::test::ScratchDir scratch;
  NaiveLlama naive = tiny_llama();
  std::erase(naive.order, "blk.1.ffn_up.weight");
  expect_error(
      ErrorCode::format, [&] { load_model(scratch.write("a.gguf", naive.gguf()), {}); }, "blk.1.ffn_up.weight");
  naive = tiny_llama();
  naive.dims["blk.0.attn_k.weight"] = {32, 48};
  expect_error(
      ErrorCode::format, [&] { load_model(scratch.write("b.gguf", naive.gguf()), {}); }, "blk.0.attn_k.weight",
      "[48, 32]", "[32, 48]");
}

TEST(LoadModel, RefusesBadOptions) {
  const io::test::ScratchDir scratch;
  const std::string path = scratch.write("tiny.gguf", tiny_llama().gguf());
  expect_error(
      ErrorCode::unsupported, [&] { load_model(path, {.backend = "tpu"}); }, "tpu");
  expect_error(
      ErrorCode::invalid_argument, [&] { load_model(path, {.dtype = "int3"}); }, "int3");
  expect_error(
      ErrorCode::invalid_argument, [&] { load_model(path, {.num_threads = 1000}); }, "1000");
  expect_error(
      ErrorCode::io, [&] { load_model(scratch.path("nowhere.gguf"), {}); }, "nowhere.gguf");
}

TEST(LoadProgress, SpeaksAfterEachIntervalUntilAllIsRead) {
  using namespace std::chrono_literals;
  std::vector<std::string> lines;
  const LogLevel level = log_level();
  set_log_level(LogLevel::info);
  set_log_sink([&](LogLevel, const std::string& line) { lines.push_back(line); });
  LoadProgress often("often", 0ns), seldom("seldom", 1h);
  for (const std::int64_t done : {2'000'000, 4'000'000, 9'000'000}) {
    often(done, 9'000'000);
    seldom(done, 9'000'000);
  }
  set_log_sink({});
  set_log_level(level);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].rfind("loading often: 2 of 9 MB, ", 0), 0u) << lines[0];
  EXPECT_EQ(lines[1].rfind("loading often: 4 of 9 MB, ", 0), 0u) << lines[1];
}

}  // namespace
}  // namespace nb::model
