// KV of a device that survives its engine: read back from the device, written to it again, and nobody else's.
#include "engine/disk_tier.h"

#include <gtest/gtest.h>

#include <fstream>

#include "cuda_emulation/device_fixture.h"
#include "engine/engine_fixture.h"
#include "kv/disk_scratch.h"

namespace nb::engine {
namespace {

constexpr std::chrono::seconds kLong{60};

EngineOptions keeping(const kv::Scratch& scratch) {
  return {.kv_format = quant::KvFormat::f32,
          .max_num_seqs = 3,
          .kv_store_path = scratch.store(),
          .kv_store_bytes = std::int64_t{1} << 30};
}

/// A prompt of one block and a little, and one with a chunk of 10 tokens behind a block; short, for an emulator.
std::vector<Request> requests() {
  std::vector<Request> requests = {random_request(400, 18, 3), random_request(401, 30, 3)};
  requests[1].chunks = {{.begin = 16, .count = 10, .anchor = {1, 2}}};
  requests[1].reuse.mode = ReuseMode::isolated;
  return requests;
}

constexpr std::int64_t kRestored = 16 + 16 + 12;  // two blocks, and the chunk with its anchor

std::vector<std::vector<TokenId>> run(const model::TinyModelOptions& where, const EngineOptions& options,
                                      EngineStats* stats = nullptr) {
  const auto model = model::make_tiny_model(where);
  Engine engine(*model, options);
  std::vector<std::vector<TokenId>> tokens;
  for (const Answer& answer : answer_all(engine, requests())) {
    EXPECT_EQ(answer.error, "");
    tokens.push_back(answer.tokens);
  }
  engine.finish_saving(kLong);
  engine.check_invariants();
  if (stats != nullptr) *stats = engine.stats();
  return tokens;
}

/// The kernels of the reference over memory that the host does not see.
class DiskTierOnDevice : public testing::Test {
 protected:
  model::TinyModelOptions device_{.device = &emulation::reference_backend()};
  kv::Scratch scratch_;
};

TEST_F(DiskTierOnDevice, PrefixesAndChunksComeBack) {
  EngineOptions plain = keeping(scratch_);
  plain.kv_store_path.clear();
  const std::size_t before = emulation::device_bytes_in_use();
  const auto expected = run(device_, plain);
  EngineStats stats;
  EXPECT_EQ(run(device_, keeping(scratch_), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, 0);
  EXPECT_EQ(stats.disk.writes, 3);
  const std::int64_t computed = stats.prompt_tokens;
  EXPECT_EQ(run(device_, keeping(scratch_), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, kRestored);
  EXPECT_EQ(stats.disk_hit_chunks, 1);
  EXPECT_EQ(stats.disk.hits, 3);
  EXPECT_EQ(stats.disk.writes, 0);
  EXPECT_EQ(stats.prompt_tokens, computed - kRestored) << "what is restored is not computed";
  EXPECT_EQ(emulation::device_bytes_in_use(), before);
}

TEST_F(DiskTierOnDevice, ADamagedRecordIsComputedAgain) {
  const auto expected = run(device_, keeping(scratch_));
  for (const std::string& name : scratch_.names()) {
    std::fstream file(scratch_.store() + "/" + name, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-5, std::ios::end);
    const int byte = file.get();
    file.seekp(-5, std::ios::end);
    file.put(static_cast<char>(byte ^ 1));
  }
  EngineStats stats;
  EXPECT_EQ(run(device_, keeping(scratch_), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, 0);
  EXPECT_EQ(stats.disk.missed(kv::MissReason::checksum), 3);
  EXPECT_EQ(stats.disk.writes, 3) << "they are written again";
}

/// Kernels of the host sum up in other orders, so that their KV differs in its last bits.
TEST(DiskTierOnCuda, FindsItsOwnRecordsAndNotThoseOfTheHost) {
  const kv::Scratch scratch;
  const model::TinyModelOptions host, device{.device = &cuda::tested_backend()};
  EngineStats stats;
  const auto expected = run(host, keeping(scratch));
  EXPECT_EQ(run(device, keeping(scratch), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, 0);
  EXPECT_EQ(stats.disk.hits, 0);
  EXPECT_EQ(stats.disk.foreign_records, 3);
  EXPECT_EQ(stats.disk.writes, 3);
  EXPECT_EQ(run(device, keeping(scratch), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, kRestored);
  EXPECT_EQ(stats.disk_hit_chunks, 1);
  EXPECT_EQ(run(host, keeping(scratch), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, kRestored);
  EXPECT_EQ(stats.disk.foreign_records, 3);
}

}  // namespace
}  // namespace nb::engine
