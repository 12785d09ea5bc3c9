// That the whole file is JSON, nested and in order of time, is checked by tests/python/test_trace.py.
#include "engine/step_trace.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "base/code_of.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int count(const std::string& text, const std::string& what) {
  int found = 0;
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++found;
  return found;
}

std::string path_for(const char* name) {
  const auto folder = std::filesystem::path(testing::TempDir()) / "nanobraid_trace";
  std::filesystem::create_directories(folder);
  return folder / name;
}

TEST(StepTrace, WritesStepsPhasesAndRequestsAsTheyHappen) {
  const std::string path = path_for("steps.json");
  const auto model = model::make_tiny_model();
  {
    Engine engine(*model, {.max_batch_tokens = 32, .trace_path = path});
    Request request = random_request(1, 40, 3);
    request.n = 2;
    const RequestId cancelled = engine.submit(random_request(2, 10, 10));
    engine.submit(request);
    engine.step();
    const std::string early = read_all(path);  // a process that dies now leaves this
    EXPECT_EQ(early.front(), '[');
    EXPECT_EQ(early.back(), '}');
    EXPECT_EQ(count(early, "\"name\":\"step\""), 1);
    EXPECT_EQ(count(early, "\"ph\":\"b\""), 3);
    EXPECT_EQ(count(early, "\"rows\":32,\"prompt_rows\":32,\"sequences\":2"), 1);
    engine.cancel(cancelled);
    Answers answers;
    while (engine.has_work()) engine.step();
    const std::string late = read_all(path);
    EXPECT_EQ(count(late, "\"name\":\"step\""), engine.stats().steps);
    for (const char* phase : {"plan", "forward", "head", "sample", "commit"}) {
      EXPECT_GE(count(late, concat("\"name\":\"", phase, '"')), 3) << phase;
    }
    EXPECT_EQ(count(late, "\"ph\":\"e\""), 3);
    EXPECT_EQ(count(late, "\"name\":\"first step\""), 3);
    EXPECT_EQ(count(late, "\"name\":\"first token\""), 3);
    EXPECT_EQ(count(late, "\"finish_reason\":\"length\",\"generated_tokens\":3,\"cached_tokens\":39"), 1);
    EXPECT_EQ(count(late, "\"finish_reason\":\"abort\""), 1);
    EXPECT_EQ(count(late, "\"id\":\"2.1\""), 4);
  }
  const std::string whole = read_all(path);
  EXPECT_EQ(whole.substr(whole.size() - 4), "}\n]\n");
}

TEST(StepTrace, AFailedStepIsInIt) {
  const std::string path = path_for("failed.json");
  const auto model = model::make_tiny_model({.nan_token = 7});
  Engine engine(*model, {.trace_path = path});
  Request bad = random_request(2, 31, 6, 7);
  bad.prompt.back() = 7;
  bad.sampling.temperature = 1.0;
  engine.submit(bad);
  EXPECT_EQ(code_of([&] { engine.step(); }), ErrorCode::internal);
  engine.step();
  const std::string text = read_all(path);
  EXPECT_EQ(count(text, "\"failed\":true"), 1);
  EXPECT_EQ(count(text, "\"failed\":false"), 1);
}

TEST(StepTrace, APathThatCannotBeWrittenIsRefusedByName) {
  const auto model = model::make_tiny_model();
  const std::string folder = path_for("no_such_folder") + "/trace.json";
  for (const std::string& path : {folder, testing::TempDir()}) {
    try {
      const Engine engine(*model, {.trace_path = path});
      ADD_FAILURE() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::io);
      EXPECT_NE(std::string(error.what()).find("trace_path: cannot write " + path), std::string::npos) << error.what();
    }
  }
}

TEST(StepTrace, AFullDiskIsRefusedAtTheStart) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this system has no /dev/full";
  EXPECT_EQ(code_of([] { const StepTrace trace("/dev/full"); }), ErrorCode::io);
}

TEST(StepTrace, ManySubmissionsBetweenStepsAreWrittenInBetween) {
  const std::string path = path_for("many.json");
  StepTrace trace(path);
  for (RequestId id = 1; id <= 5000; ++id) trace.submitted({.request = id, .choice = 0}, 10, Clock::now());
  EXPECT_GT(read_all(path).size(), 400'000u);  // of about 500,000: what is held back is bounded
}

}  // namespace
}  // namespace nb::engine
