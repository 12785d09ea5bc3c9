// Engines that are killed while they keep KV: the next one answers with the same tokens, and the store does not grow.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <thread>

#include "base/effort.h"
#include "base/log.h"
#include "engine/engine_fixture.h"
#include "kv/disk_scratch.h"

namespace nb::engine {
namespace {

/// Two records each, of 16 blocks and of the rest.
Request numbered_request(unsigned number) {
  return random_request(1000 + number, 260 + static_cast<int>(number) % 5 * 16, 4);
}

constexpr unsigned kNumRequests = 24;

EngineOptions keeping(const kv::Scratch& scratch) {
  EngineOptions options;
  options.kv_store_path = scratch.store();
  // Of all that is asked for a third, so that records are evicted and written again without end.
  options.kv_store_bytes = kNumRequests / 3 * 20 * kv::KvShape{quant::KvFormat::f32, 2, 2, 16}.block_bytes();
  return options;
}

bool has_temporary(const kv::Scratch& scratch) {
  if (!std::filesystem::exists(scratch.store())) return false;
  return std::ranges::any_of(scratch.names(), [](const std::string& name) { return !kv::is_record_file_name(name); });
}

/// Asks until it is killed.
[[noreturn]] void answer_for_ever(const model::Model& model, const EngineOptions& options, unsigned begin) {
  try {
    Engine engine(model, options);
    for (unsigned i = begin; true; ++i) {
      engine.submit(numbered_request(i % kNumRequests));
      while (engine.has_work() || engine.has_saves()) {
        if (engine.has_work()) static_cast<void>(engine.step());
        if (engine.has_saves()) engine.save_next();
      }
    }
  } catch (...) {
  }
  ::_exit(1);
}

TEST(DiskTierKilled, WhileItWrites) {
  const kv::Scratch scratch;
  // Where a sanitizer makes all slower, whatever computes soonest.
  const auto model = model::make_tiny_model({.backend = is_reduced() ? engine_backends().back() : "scalar"});
  std::vector<std::vector<TokenId>> expected;
  {
    Engine plain(*model, {});
    for (unsigned i = 0; i < kNumRequests; ++i) expected.push_back(answer_one(plain, numbered_request(i)).tokens);
  }
  const LogLevel level = log_level();
  set_log_level(LogLevel::error);
  std::mt19937 random(5);
  int interrupted = 0;
  std::int64_t hit_tokens = 0;
  const int num_rounds = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 200 : is_reduced() ? 8 : 20;
  for (int round = 0; round < num_rounds; ++round) {
    const pid_t child = ::fork();  // nothing else runs here: engines and their threads have ended
    ASSERT_GE(child, 0);
    if (child == 0) answer_for_ever(*model, keeping(scratch), static_cast<unsigned>(round) * 5);
    // At any time, or when a file is being written, which a sanitizer may let take a while.
    const auto begin = Clock::now();
    if (round % 2 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(20'000 + random() % 40'000));
    } else {
      while (!has_temporary(scratch) && Clock::now() - begin < std::chrono::seconds(10)) {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    }
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "it ended by itself";
    if (!std::filesystem::exists(scratch.store())) continue;  // killed before anything
    interrupted += has_temporary(scratch) ? 1 : 0;

    Engine engine(*model, keeping(scratch));
    ASSERT_FALSE(has_temporary(scratch));
    ASSERT_LE(scratch.bytes(), keeping(scratch).kv_store_bytes);
    for (unsigned i = 0; i < 3; ++i) {
      const unsigned number = (static_cast<unsigned>(round) * 5 + i) % kNumRequests;
      ASSERT_EQ(answer_one(engine, numbered_request(number)).tokens, expected[number]);
    }
    const EngineStats stats = engine.stats();
    ASSERT_EQ(stats.disk.damaged_removed, 0) << "a name stands for half a record";
    for (const auto reason : {kv::MissReason::torn, kv::MissReason::checksum, kv::MissReason::tokens}) {
      ASSERT_EQ(stats.disk.missed(reason), 0) << to_string(reason);
    }
    hit_tokens += stats.disk_hit_tokens;
  }
  set_log_level(level);
  RecordProperty("interrupted", interrupted);
  EXPECT_GE(interrupted, num_rounds / 20) << "or nothing was tested";
  EXPECT_GT(hit_tokens, num_rounds * 100);
}

}  // namespace
}  // namespace nb::engine
