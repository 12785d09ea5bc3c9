// KV that survives its engine: the same tokens from the store as from computing, and nothing from it that is not the
// very same model's, namespace's and tokens'.
#include "engine/disk_tier.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <thread>

#include "base/effort.h"
#include "base/error.h"
#include "engine/engine_fixture.h"
#include "engine/engine_thread.h"
#include "engine/outbox.h"
#include "kv/disk_scratch.h"

namespace nb::engine {
namespace {

using kv::digest_of;
using kv::MissReason;
using model::make_tiny_model;

constexpr std::chrono::seconds kLong{60};

EngineOptions keeping(const kv::Scratch& scratch, std::string_view content = "a model") {
  EngineOptions options;
  options.kv_store_path = scratch.store();
  options.kv_store_bytes = std::int64_t{1} << 30;
  options.kv_store_fingerprint = digest_of(content);
  return options;
}

std::vector<std::vector<TokenId>> tokens_of(const std::vector<Answer>& answers) {
  std::vector<std::vector<TokenId>> tokens;
  for (const Answer& answer : answers) {
    EXPECT_EQ(answer.error, "");
    tokens.push_back(answer.tokens);
  }
  return tokens;
}

/// Answers of a new engine that has written everything when this returns.
std::vector<std::vector<TokenId>> run(const model::Model& model, const EngineOptions& options,
                                      const std::vector<Request>& requests, EngineStats* stats = nullptr) {
  Engine engine(model, options);
  auto tokens = tokens_of(answer_all(engine, requests));
  engine.finish_saving(kLong);
  engine.check_invariants();
  EXPECT_EQ(engine.stats().blocks_owned, engine.stats().chunk_blocks);
  if (stats != nullptr) *stats = engine.stats();
  return tokens;
}

/// What the files say about themselves.
std::vector<kv::RecordInfo> records_in(const kv::Scratch& scratch) {
  std::vector<kv::RecordInfo> records;
  for (const std::string& name : scratch.names()) {
    std::ifstream file(scratch.store() + "/" + name, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    const auto data = std::as_bytes(std::span(bytes));
    std::uint64_t head_bytes = 0;
    EXPECT_EQ(kv::measure_record_head(data, data.size(), &head_bytes), kv::RecordFault::none) << name;
    kv::RecordHead head;
    EXPECT_EQ(kv::parse_record_head(data.first(head_bytes), data.size(), &head), kv::RecordFault::none) << name;
    records.push_back(head.info);
  }
  return records;
}

std::string file_of(const kv::Scratch& scratch, const kv::RecordInfo& record) {
  for (const std::string& name : scratch.names()) {
    if (name.starts_with(to_hex(record.key))) return scratch.store() + "/" + name;
  }
  ADD_FAILURE() << "no file of the record";
  return {};
}

int restorable(const Request& request) { return (static_cast<int>(request.prompt.size()) - 1) / 16 * 16; }

class DiskTierInEveryFormat : public EveryKvFormat {
 protected:
  static EngineOptions plain() { return {.kv_format = GetParam().format}; }
  static EngineOptions kept(const kv::Scratch& scratch) {
    EngineOptions options = keeping(scratch);
    options.kv_format = GetParam().format;
    return options;
  }
};

TEST_P(DiskTierInEveryFormat, ARestartChangesNoToken) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  const std::vector<Request> requests = mixed_requests();
  const auto expected = run(*model, plain(), requests);
  EngineStats first, second;
  EXPECT_EQ(run(*model, kept(scratch), requests, &first), expected);
  EXPECT_EQ(first.disk_hit_tokens, 0);
  EXPECT_GT(first.disk.writes, 0);
  EXPECT_EQ(run(*model, kept(scratch), requests, &second), expected);
  int hits = 0;
  std::int64_t prompts = 0;
  for (const Request& request : requests) {
    hits += restorable(request);
    prompts += static_cast<std::int64_t>(request.prompt.size());
  }
  EXPECT_EQ(second.disk_hit_tokens, hits);
  EXPECT_EQ(second.prompt_tokens, prompts - hits) << "what is restored is not computed";
  EXPECT_EQ(second.disk.writes, 0) << "nothing is written twice";
  EXPECT_GT(second.disk_load_seconds, 0.0);
}

INSTANTIATE_TEST_SUITE_P(Engine, DiskTierInEveryFormat, testing::ValuesIn(kv_cases()), kv_case_name);

TEST(DiskTier, LongerAndOtherPromptsTakeWhatTheyShare) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  Request base = random_request(5, 330, 8);  // blocks of 336 tokens: a record of 16 and one of 5
  const auto answer = run(*model, keeping(scratch), {base}).front();
  ASSERT_EQ(records_in(scratch).size(), 2u);
  const auto with_tail = [&](std::size_t kept, unsigned seed, int more) {
    Request request = random_request(seed, more, 8);
    request.prompt.insert(request.prompt.begin(), base.prompt.begin(), base.prompt.begin() + static_cast<int>(kept));
    return request;
  };
  Request conversation = base;
  conversation.prompt.insert(conversation.prompt.end(), answer.begin(), answer.end());
  conversation.prompt.insert(conversation.prompt.end(), 20, 7);
  const struct {
    Request request;
    int hits;
  } cases[] = {
      {conversation, 336},            // with a block of which part was generated
      {with_tail(330, 71, 40), 320},  // other tokens within the last block
      {with_tail(300, 72, 60), 288},  // a part of the second record
      {with_tail(100, 73, 60), 96},   // a part of the first
      {with_tail(15, 74, 60), 0},    {with_tail(0, 75, 60), 0},
  };
  for (const auto& one : cases) {
    const kv::Scratch other;
    std::filesystem::copy(scratch.store(), other.store());
    EngineStats stats;
    EXPECT_EQ(run(*model, keeping(other), {one.request}, &stats), run(*model, {}, {one.request}));
    EXPECT_EQ(stats.disk_hit_tokens, one.hits);
    EXPECT_EQ(stats.disk.missed(MissReason::absent), one.hits == 0 ? 1 : 0);
  }
}

TEST(DiskTier, GoesOnWhereThePrefixCacheEnds) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  const Request whole = random_request(6, 400, 8);
  const auto expected = run(*model, keeping(scratch), {whole}).front();
  Request beginning = whole;
  beginning.prompt.resize(5 * 16 + 3);
  beginning.max_tokens = 1;
  Engine engine(*model, keeping(scratch));
  answer_one(engine, beginning);
  EXPECT_EQ(engine.stats().disk_hit_tokens, 80);
  EXPECT_EQ(answer_one(engine, whole).tokens, expected);
  EXPECT_EQ(engine.stats().prefix_hit_tokens, 80);
  EXPECT_EQ(engine.stats().disk_hit_tokens, 384) << "records begin before what is missing";
  // Now all of it is in memory.
  EXPECT_EQ(answer_one(engine, whole).tokens, expected);
  EXPECT_EQ(engine.stats().disk_hit_tokens, 384);
  EXPECT_EQ(engine.stats().prefix_hit_tokens, 80 + 384);
}

TEST(DiskTier, NamespacesNeverMeet) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  Request request = random_request(9, 100, 8);
  request.cache_salt = "alice";
  const auto expected = run(*model, keeping(scratch), {request});
  for (const char* salt : {"bob", "", "alice "}) {
    EngineStats stats;
    request.cache_salt = salt;
    EXPECT_EQ(run(*model, keeping(scratch), {request}, &stats), expected);
    EXPECT_EQ(stats.disk_hit_tokens, 0) << "of " << salt;
  }
  EngineStats stats;
  request.cache_salt = "alice";
  EXPECT_EQ(run(*model, keeping(scratch), {request}, &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, 96);
}

TEST(DiskTier, AnotherModelOrFormatFindsNothing) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  const auto other_model = make_tiny_model({.seed = 2});
  const std::vector<Request> requests = {random_request(10, 150, 8)};
  run(*model, keeping(scratch), requests);
  EngineStats stats;
  const auto of_other = run(*other_model, {}, requests);
  ASSERT_NE(of_other, run(*model, {}, requests));
  EXPECT_EQ(run(*other_model, keeping(scratch, "edited"), requests, &stats), of_other);
  EXPECT_EQ(stats.disk_hit_tokens, 0);
  EXPECT_GT(stats.disk.foreign_records, 0);
  EngineOptions options = keeping(scratch);
  options.kv_format = quant::KvFormat::bf16;
  run(*model, options, requests, &stats);
  EXPECT_EQ(stats.disk_hit_tokens, 0);
  run(*model, keeping(scratch), requests, &stats);
  EXPECT_EQ(stats.disk_hit_tokens, 144);
}

TEST(DiskTier, FingerprintHasEveryFact) {
  using Change = std::function<void(model::TinyModelOptions&)>;
  const Digest content = digest_of("content");
  const auto fingerprint = [&](const Change& change) {
    model::TinyModelOptions options;
    change(options);
    return kv_fingerprint(*make_tiny_model(options), quant::KvFormat::f32, content);
  };
  std::vector<Digest> all = {
      fingerprint([](auto&) {}),
      fingerprint([](auto& options) { options.backend = "scalar"; }),
      fingerprint([](auto& options) { options.dtype = "bf16", options.backend = "scalar"; }),
      fingerprint([](auto& options) { options.num_layers = 3; }),
      fingerprint([](auto& options) { options.vocab_size = 321; }),
  };
  const auto model = make_tiny_model();
  EXPECT_EQ(kv_fingerprint(*model, quant::KvFormat::f32, content), all.front()) << "and nothing else";
  all.push_back(kv_fingerprint(*model, quant::KvFormat::bf16, content));
  all.push_back(kv_fingerprint(*model, quant::KvFormat::f16, content));
  all.push_back(kv_fingerprint(*model, quant::KvFormat::int8, content));
  all.push_back(kv_fingerprint(*model, quant::KvFormat::mixed, content));
  all.push_back(kv_fingerprint(*model, quant::KvFormat::f32, digest_of("other content")));
  const auto with_config = [&](const std::function<void(model::ModelConfig&)>& change) {
    model::TinyModelOptions options;
    const ops::Backend& backend = ops::find_backend("reference");
    auto pool = std::make_unique<ThreadPool>(1);
    model::ModelConfig config = model::tiny_config(options);
    model::ModelWeights weights = model::TinyWeights(options, backend, *pool).build(config);
    change(config);
    const model::Model changed(std::move(config), std::move(weights), backend, std::move(pool));
    all.push_back(kv_fingerprint(changed, quant::KvFormat::f32, content));
  };
  with_config([](auto& config) { config.rope.theta = 500.0; });
  with_config([](auto& config) { config.rope = {.scaling = model::RopeScaling::linear, .factor = 1.0}; });
  with_config([](auto& config) { config.rope = {.scaling = model::RopeScaling::linear, .factor = 2.0}; });
  with_config([](auto& config) { config.rope.divisors.assign(8, 1.0f); });
  with_config([](auto& config) { config.rms_norm_eps = 1e-6f; });
  with_config([](auto& config) { config.sliding_window = 64; });
  with_config([](auto& config) { config.architecture = "mistral"; });
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(all[i], all[j]) << i << " and " << j;
  }
}

TEST(DiskTier, DamagedRecordsAreComputedAgain) {
  const auto model = make_tiny_model();
  const Request request = random_request(11, 400, 8);  // records of 256 and 144 tokens
  const auto expected = run(*model, {}, {request});
  enum class Damage { flip_payload, flip_head, cut, remove };
  const struct {
    int position;
    Damage damage;
    MissReason reason;
    int hits;
  } cases[] = {
      {0, Damage::flip_payload, MissReason::checksum, 0},  {256, Damage::flip_payload, MissReason::checksum, 256},
      {256, Damage::flip_head, MissReason::checksum, 256}, {256, Damage::cut, MissReason::torn, 256},
      {0, Damage::remove, MissReason::absent, 0},
  };
  for (const auto& one : cases) {
    const kv::Scratch scratch;
    run(*model, keeping(scratch), {request});
    Engine engine(*model, keeping(scratch));  // opened before the damage: nothing is seen at once
    std::string path;
    std::uint64_t head_bytes = 0;
    for (const kv::RecordInfo& record : records_in(scratch)) {
      if (static_cast<int>(record.position) != one.position) continue;
      path = file_of(scratch, record);
      head_bytes = kv::record_head_bytes(record);
    }
    const auto size = std::filesystem::file_size(path);
    if (one.damage == Damage::remove) {
      std::filesystem::remove(path);
    } else if (one.damage == Damage::cut) {
      std::filesystem::resize_file(path, size - 1);
    } else {
      std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
      const auto at = static_cast<std::streamoff>(one.damage == Damage::flip_head ? 60 : head_bytes + 1000);
      file.seekg(at);
      const int byte = file.get();
      file.seekp(at);
      file.put(static_cast<char>(byte ^ 16));
    }
    EXPECT_EQ(answer_one(engine, request).tokens, expected.front());
    engine.finish_saving(kLong);
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.disk_hit_tokens, one.hits);
    EXPECT_EQ(stats.disk.missed(one.reason), 1) << to_string(one.reason);
    EXPECT_EQ(stats.disk.damaged_removed, one.damage == Damage::remove ? 0 : 1);
    EXPECT_EQ(stats.disk.writes, 1) << "it is written again";
    EngineStats again;
    EXPECT_EQ(run(*model, keeping(scratch), {request}, &again), expected);
    EXPECT_EQ(again.disk_hit_tokens, restorable(request));
  }
}

TEST(DiskTier, KeepsServingWithoutRoomOnDisk) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  const std::vector<Request> requests = mixed_requests();
  EngineOptions options = keeping(scratch);
  options.kv_store_bytes = 10'000;
  EngineStats stats;
  EXPECT_EQ(run(*model, options, requests, &stats), run(*model, {}, requests));
  EXPECT_GT(stats.disk.failed(kv::WriteFailure::quota), 0);
  EXPECT_LE(scratch.bytes(), 10'000);
}

TEST(DiskTier, SettlesTheMemoryBeforeItIsFilled) {
  const kv::Scratch scratch;
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 4);
  int num_settled = 0;
  const auto settle = [&] {  // as poisoning and clearing do, which would wipe what is loaded before
    storage.zero(2);
    ++num_settled;
  };
  DiskTier tier(scratch.store(), 1 << 20, digest_of("model"), {.storage = storage, .num_readers = 2, .settle = settle});
  const kv::PrefixKeys keys{.root = digest_of("root"), .keys = {digest_of("key")}};
  const std::vector<TokenId> tokens(16, 3);
  const std::vector<BlockId> from = {1}, to = {2};
  std::ranges::fill(storage.host_memory(1), std::byte{9});
  tier.save({.kind = kv::RecordKind::prefix,
             .root = keys.root,
             .parent = keys.root,
             .key = keys.keys[0],
             .position = 0,
             .tokens = tokens,
             .blocks = from});
  tier.finish(kLong);
  const auto load = [&](std::span<const TokenId> wanted) {
    const LoadId id = tier.begin_prefix(keys, wanted, to, 0);
    EXPECT_NE(id, 0u);
    while (true) {
      const std::uint64_t seen = tier.progress();
      if (const std::optional<int> loaded = tier.take(id)) return *loaded;
      tier.wait(seen, Clock::now() + kLong);
    }
  };
  EXPECT_EQ(load(tokens), 1);
  EXPECT_EQ(num_settled, 1);
  EXPECT_TRUE(std::ranges::equal(storage.host_memory(1), storage.host_memory(2)));
  const std::vector<TokenId> others(16, 4);
  EXPECT_EQ(load(others), 0) << "the same key for other tokens";
  EXPECT_EQ(tier.stats().store.missed(MissReason::tokens), 1);
}

TEST(DiskTier, StepsWaitForALoadOnlyWhereNothingElseIsToBeDone) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  const Request stored = random_request(14, 400, 4), other = random_request(15, 30, 60);
  const auto expected = run(*model, keeping(scratch), {stored}).front();
  Engine engine(*model, keeping(scratch));
  EXPECT_FALSE(engine.waits_for_load());
  engine.submit(stored);
  Answers answers;
  add(answers, engine.step());
  EXPECT_EQ(engine.stats().blocks_owned, kv::BlockTable::blocks_for(400)) << "it has its blocks";
  int num_steps = 0;
  for (; engine.has_work(); ++num_steps) add(answers, engine.step());
  EXPECT_EQ(answers.begin()->second.tokens, expected);
  EXPECT_LE(num_steps, 4 + 1) << "steps that find nothing to do do not come again and again";
  // Others do not wait.
  Engine busy(*model, keeping(scratch));
  busy.submit(other);
  busy.step();
  busy.submit(stored);
  answers.clear();
  while (busy.has_work()) {
    EXPECT_FALSE(busy.waits_for_load());
    std::vector<StepOutput> outputs = busy.step();
    EXPECT_FALSE(outputs.empty());
    add(answers, std::move(outputs));
  }
  EXPECT_EQ(answers.rbegin()->second.tokens, expected);
  EXPECT_EQ(busy.stats().disk_hit_tokens, restorable(stored));
}

TEST(DiskTier, ADeadlineOrACancellationEndsALoad) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  Request request = random_request(16, 480, 4);
  const auto expected = run(*model, keeping(scratch), {request}).front();
  for (const bool cancels : {true, false}) {
    Engine engine(*model, keeping(scratch));
    request.timeout_seconds = cancels ? 0.0 : 1e-6;
    const RequestId id = engine.submit(request);
    std::vector<StepOutput> outputs;
    if (cancels) {
      static_cast<void>(engine.step());  // begins the load, which may be quick
      engine.cancel(id);
    }
    outputs = engine.step();
    ASSERT_EQ(outputs.size(), 1u);
    EXPECT_EQ(outputs[0].finish_reason, cancels ? FinishReason::abort : FinishReason::timeout);
    EXPECT_EQ(engine.stats().blocks_owned, 0);
    engine.check_invariants();
    request.timeout_seconds = 0.0;
    EXPECT_EQ(answer_one(engine, request).tokens, expected);
    EXPECT_EQ(engine.stats().disk_hit_tokens, restorable(request));
  }
}

TEST(DiskTier, RefusesWhatItCannotUse) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  EngineOptions options = keeping(scratch);
  std::ofstream(scratch.folder() + "/file") << "text";
  options.kv_store_path = scratch.folder() + "/file";
  EXPECT_THROW(Engine(*model, options), Error);
  options = keeping(scratch);
  options.kv_store_bytes = 0;
  EXPECT_THROW(Engine(*model, options), Error);
}

TEST(DiskTier, PreemptionAndCancellationWhileBlocksWait) {
  const auto model = make_tiny_model();
  std::int64_t preemptions = 0, dropped = 0, hits = 0, writes = 0;
  Engine plain(*model, {.enable_prefix_caching = false});
  for (unsigned seed = 0; seed < (is_reduced() ? 6 : 12); ++seed) {
    const kv::Scratch scratch;
    std::mt19937 random(seed);
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    std::vector<Request> requests;
    for (unsigned i = 0; i < 14; ++i) {
      requests.push_back(random_request(seed * 7 + i % 5, draw(20, 300), draw(1, 40)));
      if (draw(0, 3) == 0) requests.back().n = draw(2, 3);
    }
    std::vector<std::vector<TokenId>> expected;
    for (Request alone : requests) {
      alone.n = 1;
      expected.push_back(answer_one(plain, alone).tokens);
    }
    for (int round = 0; round < 2; ++round) {
      EngineOptions options = keeping(scratch);
      options.max_num_seqs = 6;
      options.max_batch_tokens = 96;
      options.kv_cache_bytes = 26 * kv::KvShape{quant::KvFormat::f32, 2, 2, 16}.block_bytes();
      Engine engine(*model, options);
      Answers answers;
      std::map<RequestId, std::size_t> asked;
      std::size_t next = 0;
      for (int step = 0; engine.has_work() || next < requests.size(); ++step) {
        ASSERT_LT(step, 20'000);
        if (next < requests.size() && draw(0, 2) > 0) {
          asked[engine.submit(requests[next])] = next;
          ++next;
        }
        if (draw(0, 24) == 0 && !asked.empty()) engine.cancel(static_cast<RequestId>(draw(1, static_cast<int>(next))));
        for (StepOutput& output : engine.step()) {
          if (output.choice == 0) {
            std::vector<StepOutput> one;
            one.push_back(std::move(output));
            add(answers, std::move(one));
          }
        }
        if (!is_sanitized()) engine.check_invariants();
      }
      for (const auto& [id, index] : asked) {
        const std::vector<TokenId>& got = answers[id].tokens;
        ASSERT_LE(got.size(), expected[index].size());
        EXPECT_TRUE(std::equal(got.begin(), got.end(), expected[index].begin())) << "seed " << seed;
        EXPECT_TRUE(answers[id].finish_reason == FinishReason::abort || got == expected[index]) << "seed " << seed;
      }
      engine.finish_saving(kLong);
      engine.check_invariants();
      EXPECT_EQ(engine.stats().blocks_owned, 0);
      preemptions += engine.stats().preemptions;
      dropped += engine.stats().disk_saves_dropped;
      hits += engine.stats().disk_hit_tokens;
      writes += engine.stats().disk.writes;
    }
  }
  EXPECT_GT(preemptions, 10);
  EXPECT_GT(dropped, 10) << "blocks were never needed by others while they waited";
  EXPECT_GT(hits, 2000);
  EXPECT_GT(writes, 40);
}

TEST(DiskTier, SeveralAnswersShareARestoredPrompt) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  Request request = random_request(13, 150, 10);
  request.n = 3;
  request.sampling.temperature = 1.0;
  request.sampling.seed = 3;
  const auto collect = [&](const EngineOptions& options, EngineStats* stats) {
    Engine engine(*model, options);
    engine.submit(request);
    std::map<int, std::vector<TokenId>> choices;
    while (engine.has_work()) {
      for (const StepOutput& output : engine.step()) {
        std::vector<TokenId>& tokens = choices[output.choice];
        tokens.insert(tokens.end(), output.token_ids.begin(), output.token_ids.end());
      }
      engine.check_invariants();
    }
    engine.finish_saving(kLong);
    *stats = engine.stats();
    return choices;
  };
  EngineStats stats;
  const auto expected = collect({}, &stats);
  EXPECT_EQ(collect(keeping(scratch), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, 0);
  EXPECT_EQ(collect(keeping(scratch), &stats), expected);
  EXPECT_EQ(stats.disk_hit_tokens, 144);
  EXPECT_EQ(stats.forked_tokens, 2 * 149);
}

// ---- chunks ----

/// 20 tokens, a chunk of 45, 7 tokens, a chunk of 33, 30 tokens.
Request composed(ReuseMode mode, double ratio = 0.3) {
  Request request = random_request(21, 135, 10);
  request.chunks = {{.begin = 20, .count = 45, .anchor = {}}, {.begin = 72, .count = 33, .anchor = {1, 2, 3}}};
  request.reuse.mode = mode;
  request.reuse.ratio = ratio;
  return request;
}

TEST_P(DiskTierInEveryFormat, ChunksSurvive) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  for (const ReuseMode mode : {ReuseMode::isolated, ReuseMode::blend}) {
    const kv::Scratch scratch;
    const Request request = composed(mode);
    const auto expected = run(*model, plain(), {request});
    EngineStats stats;
    EXPECT_EQ(run(*model, kept(scratch), {request}, &stats), expected);
    EXPECT_EQ(stats.disk_hit_chunks, 0);
    const std::int64_t computed = stats.prompt_tokens;
    EXPECT_EQ(run(*model, kept(scratch), {request}, &stats), expected);
    EXPECT_EQ(stats.disk_hit_chunks, 2);
    EXPECT_EQ(stats.disk_hit_tokens, 45 + 36 + 16) << "chunks, and a block before the first of them";
    EXPECT_EQ(stats.prompt_tokens, computed - 45 - 36 - 16);
    EXPECT_EQ(stats.disk.writes, 0);
    Request other = request;
    other.cache_salt = "other";
    EXPECT_EQ(run(*model, kept(scratch), {other}, &stats), expected);
    EXPECT_EQ(stats.disk_hit_chunks, 0);
    EXPECT_EQ(stats.disk_hit_tokens, 0);
  }
}

TEST(DiskTier, ADamagedChunkIsComputedAgain) {
  const auto model = make_tiny_model();
  const Request request = composed(ReuseMode::isolated);
  const kv::Scratch scratch;
  const auto expected = run(*model, keeping(scratch), {request});
  for (const kv::RecordInfo& record : records_in(scratch)) {
    if (record.kind != kv::RecordKind::chunk || record.tokens.size() != 45) continue;
    const std::string path = file_of(scratch, record);
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-1, std::ios::end);
    file.put('\x55');
  }
  EngineStats stats;
  EXPECT_EQ(run(*model, keeping(scratch), {request}, &stats), expected);
  EXPECT_EQ(stats.disk_hit_chunks, 1);
  EXPECT_EQ(stats.disk.missed(MissReason::checksum), 1);
}

TEST(DiskTier, NothingApproximateIsKept) {
  const auto model = make_tiny_model();
  for (const ReuseMode mode : {ReuseMode::isolated, ReuseMode::blend}) {
    const kv::Scratch scratch;
    Request request = composed(mode);
    request.max_tokens = 60;
    run(*model, keeping(scratch), {request});
    int num_chunks = 0, num_prefix_tokens = 0;
    for (const kv::RecordInfo& record : records_in(scratch)) {
      if (record.kind == kv::RecordKind::chunk) ++num_chunks;
      if (record.kind == kv::RecordKind::prefix) num_prefix_tokens += static_cast<int>(record.tokens.size());
    }
    EXPECT_EQ(num_chunks, 2);
    EXPECT_EQ(num_prefix_tokens, 16) << "of the 20 tokens before the first chunk";
    Request exact = request;
    exact.reuse.mode = ReuseMode::exact;
    EngineStats stats;
    EXPECT_EQ(run(*model, keeping(scratch), {exact}, &stats), run(*model, {}, {exact}));
    EXPECT_EQ(stats.disk_hit_tokens, 16);
  }
}

TEST(DiskTier, ARemovedChunkIsRemovedFromDisk) {
  const auto model = make_tiny_model();
  for (const bool written : {true, false}) {
    const kv::Scratch scratch;
    Engine engine(*model, keeping(scratch));
    Request request = random_request(30, 40, 0);
    request.chunks = {{.begin = 0, .count = 40, .anchor = {}}};
    request.only_chunks = true;
    answer_one(engine, request);
    if (written) {
      engine.finish_saving(kLong);
      EXPECT_EQ(records_in(scratch).size(), 1u);
    }
    EXPECT_TRUE(engine.remove_chunk(engine.chunks().chunks().begin()->first));
    engine.finish_saving(kLong);
    engine.check_invariants();
    EXPECT_EQ(records_in(scratch).size(), 0u);
  }
}

// ---- several at once ----

TEST(DiskTier, TwoEnginesShareADirectory) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model(), twin = make_tiny_model();
  const std::vector<Request> requests = {random_request(40, 270, 8)};
  Engine first(*model, keeping(scratch)), second(*twin, keeping(scratch));
  const auto expected = tokens_of(answer_all(first, requests));
  first.finish_saving(kLong);
  EXPECT_EQ(tokens_of(answer_all(second, requests)), expected);
  EXPECT_EQ(second.stats().disk_hit_tokens, 256) << "a whole record that was written since it was opened";
}

TEST(DiskTier, TwoEnginesAtTheSameTime) {
  const kv::Scratch scratch;
  const auto reference = make_tiny_model();
  std::vector<Request> requests = mixed_requests();
  const auto expected = run(*reference, {}, requests);
  const auto work = [&](unsigned seed) {
    const auto model = make_tiny_model();
    std::mt19937 random(seed);
    for (int round = 0; round < 10; ++round) {
      EngineOptions options = keeping(scratch);
      if (round % 2 == 1) options.kv_store_bytes = 300'000;  // evicts what the other one reads
      Engine engine(*model, options);
      EXPECT_EQ(tokens_of(answer_all(engine, requests)), expected);
      engine.finish_saving(kLong);
    }
  };
  std::thread other(work, 1u);
  work(2);
  other.join();
  for (const std::string& name : scratch.names()) EXPECT_TRUE(kv::is_record_file_name(name)) << name;
}

TEST(DiskTier, AClosedThreadHasWrittenEverything) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model();
  const Request request = random_request(50, 400, 8);
  const auto ask = [&](EngineThread& thread) {
    const auto outbox = std::make_shared<Outbox>(Outbox::Wake::ends);
    thread.submit(request, outbox);
    std::vector<TokenId> tokens;
    while (outbox->num_unfinished() > 0) {
      for (const StepOutput& output : outbox->wait(Outbox::Seconds(1.0))) {
        tokens.insert(tokens.end(), output.token_ids.begin(), output.token_ids.end());
      }
    }
    return tokens;
  };
  EngineThread first(*model, keeping(scratch));
  const auto expected = ask(first);
  first.close();
  EXPECT_EQ(records_in(scratch).size(), 2u);
  EXPECT_EQ(first.stats().disk.writes, 2) << "after the last step too";
  EngineThread second(*model, keeping(scratch));
  EXPECT_EQ(ask(second), expected);
  EXPECT_EQ(second.stats().disk_hit_tokens, 384);
}

}  // namespace
}  // namespace nb::engine
