// decoder.cpp and model.cpp against the naive model, through the loader.
#include "model/decoder.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>

#include "base/effort.h"
#include "base/error.h"
#include "model/loader.h"
#include "model/naive_llama.h"
#include "ops/naive_policy.h"
#include "quant/kv_format.h"

namespace nb::model {
namespace {

// Feeds `ids` as one sequence in slices of `slice` tokens; returns logits of every position and the greedy tokens.
struct Result {
  std::vector<float> logits;
  std::vector<TokenId> greedy;
};

// With a policy, blocks that it lets nobody see any more are given up before each slice, and groups before the first
// one of its rows that sees their summary become that.
void apply(const ops::KeyPolicy& policy, StepInputs& inputs, int summary_block) {
  const int begin = inputs.positions.front(), end = inputs.positions.back() + 1;
  inputs.policies = {policy};
  inputs.segments.front().policy = 0;
  // A summary is made from its group in the step of the first row that no longer sees the group.
  const int row = policy.rule == ops::KeyRule::summary ? begin - 1 : begin;
  for (int b = 0; b * kBlockTokens < begin; ++b) {
    if (ops::is_dead(policy, row, b)) inputs.blocks[static_cast<std::size_t>(b)] = inputs.blocks.back();
  }
  if (policy.rule != ops::KeyRule::summary) return;
  const int own_blocks = static_cast<int>(inputs.blocks.size());
  inputs.blocks.push_back(summary_block);
  for (int first = policy.period; first + policy.period - 1 + policy.window < end; first += policy.period) {
    const int turn = first + policy.period - 1 + policy.window, number = static_cast<int>(inputs.run_positions.size());
    inputs.run_positions.push_back(turn);
    if (turn < begin) continue;  // it is there already
    inputs.summaries.push_back({.block_begin = 0,
                                .first_key = first,
                                .num_tokens = policy.period,
                                .position = first,
                                .slot = summary_block * kBlockTokens + number,
                                .slot_position = first + policy.period / 2});
  }
  if (inputs.run_positions.empty()) return;
  const ops::AttentionRun own = inputs.runs.front();
  inputs.runs = {{.block_begin = own_blocks,
                  .num_keys = static_cast<std::int32_t>(inputs.run_positions.size()),
                  .position_offset = 0,
                  .positions_begin = 0,
                  .score_bias = std::log(static_cast<float>(policy.period))},
                 own};
  inputs.segments.front().run_count = 2;
}

Result run(const Model& model, const std::vector<int>& ids, int slice, quant::KvFormat format,
           const ops::KeyPolicy* policy = nullptr) {
  const ModelConfig& config = model.config();
  const int num_blocks = static_cast<int>(ids.size()) / kBlockTokens + 3;
  kv::KvStorage storage({format, config.num_layers, config.num_kv_heads, config.head_dim}, num_blocks);
  Workspace workspace(CachingPool::create());
  ops::ExecContext ctx{model.backend().kernels, &model.pool(), &workspace};
  Result result;
  for (int begin = 0; begin < static_cast<int>(ids.size()); begin += slice) {
    const int end = std::min(begin + slice, static_cast<int>(ids.size()));
    StepInputs inputs;
    for (int p = begin; p < end; ++p) {
      inputs.token_ids.push_back(ids[static_cast<std::size_t>(p)]);
      inputs.positions.push_back(p);
      inputs.key_positions.push_back(p);
      inputs.slots.push_back((num_blocks - 1 - p / kBlockTokens) * kBlockTokens + p % kBlockTokens);
      inputs.logit_rows.push_back(p - begin);
    }
    for (int b = 0; b * kBlockTokens < end; ++b) inputs.blocks.push_back(num_blocks - 1 - b);
    inputs.runs.push_back({0, end, 0});
    inputs.segments.push_back({0, end - begin, 0, 1});
    if (policy != nullptr) apply(*policy, inputs, 0);
    const Tensor hidden = model.decoder().forward(inputs, storage, ctx);
    std::vector<float> logits(static_cast<std::size_t>((end - begin) * config.vocab_size));
    std::vector<TokenId> greedy(static_cast<std::size_t>(end - begin));
    model.decoder().head(hidden, inputs.logit_rows, Tensor(logits.data(), DType::f32, {end - begin, config.vocab_size}),
                         greedy, ctx);
    result.logits.insert(result.logits.end(), logits.begin(), logits.end());
    result.greedy.insert(result.greedy.end(), greedy.begin(), greedy.end());
    workspace.reset();
  }
  return result;
}

std::vector<int> random_ids(int count, int vocab) {
  std::mt19937 random(5);
  std::vector<int> ids;
  for (int i = 0; i < count; ++i) ids.push_back(static_cast<int>(random() % static_cast<unsigned>(vocab)));
  return ids;
}

class DecoderOnBackend : public testing::TestWithParam<std::string> {};

// A kind of model, how its file says so, and the same model with the fact in question taken away.
struct ModelCase {
  const char* name;
  std::function<void(NaiveLlama&)> make;
  std::function<void(NaiveLlama&)> forget = nullptr;  // null: there is nothing to take away
};

// The frequencies of a model of dim 16 with theta 5000, `scaled` one by one.
std::vector<double> frequencies(const std::function<double(double frequency, int pair)>& scaled) {
  std::vector<double> out;
  for (int i = 0; i < 8; ++i) out.push_back(scaled(std::pow(5000.0, -i / 8.0), i));
  return out;
}

void forget_scaling(NaiveLlama& naive) {
  naive.frequencies.clear();
  naive.magnitude = 1.0;
}

constexpr double kTwoPi = 6.283185307179586;

const ModelCase kModelCases[] = {
    {"tied, grouped heads", [](NaiveLlama&) {}},
    {"untied", [](NaiveLlama& m) { m.tied = false; }},
    {"one KV head", [](NaiveLlama& m) { m.kv_heads = 1; }},
    {"a KV head per head", [](NaiveLlama& m) { m.kv_heads = 4; }},
    {"bias, rows interleaved", [](NaiveLlama& m) { m.bias = true; }, [](NaiveLlama& m) { m.bias = false; }},
    {"qwen2", [](NaiveLlama& m) { m.architecture = "qwen2", m.bias = true, m.tied = false; },
     [](NaiveLlama& m) { m.bias = false; }},
    {"qwen3", [](NaiveLlama& m) { m.architecture = "qwen3", m.qk_norm = true; },
     [](NaiveLlama& m) { m.qk_norm = false; }},
    {"qwen3 with bias", [](NaiveLlama& m) { m.architecture = "qwen3", m.qk_norm = m.bias = true; },
     [](NaiveLlama& m) { m.bias = false; }},
    {"mistral", [](NaiveLlama& m) { m.architecture = "mistral", m.window = 37; }, [](NaiveLlama& m) { m.window = 0; }},
    {"llama with a window of one token more", [](NaiveLlama& m) { m.window = 38; },
     [](NaiveLlama& m) { m.window = 37; }},
    {"linear scaling",
     [](NaiveLlama& m) {
       m.frequencies = frequencies([](double f, int) { return f / 2.5; });
       m.more_keys = [](io::test::GgufBuilder& b) {
         b.string("llama.rope.scaling.type", "linear");
         b.number<float>("llama.rope.scaling.factor", io::test::kF32, 2.5f);
       };
     },
     forget_scaling},
    {"llama3 scaling, trained on 64 positions",
     [](NaiveLlama& m) {
       m.frequencies = frequencies([](double f, int) {
         const double turns = 64.0 * f / kTwoPi;  // over the original context
         if (turns > 4.0) return f;
         if (turns < 1.0) return f / 8.0;
         const double keep = (turns - 1.0) / 3.0;
         return keep * f + (1.0 - keep) * f / 8.0;
       });
       m.more_keys = [](io::test::GgufBuilder& b) {
         b.string("llama.rope.scaling.type", "llama3");
         b.number<float>("llama.rope.scaling.factor", io::test::kF32, 8.0f);
         b.number<float>("llama.rope.scaling.low_freq_factor", io::test::kF32, 1.0f);
         b.number<float>("llama.rope.scaling.high_freq_factor", io::test::kF32, 4.0f);
         b.number<std::uint32_t>("llama.rope.scaling.original_context_length", io::test::kU32, 64);
       };
     },
     forget_scaling},
    {"llama3 scaling as divisors",
     [](NaiveLlama& m) {
       m.divisors = {1, 1, 1.25f, 2, 4, 8, 8, 8};
       const std::vector<float> divisors = m.divisors;
       m.frequencies =
           frequencies([&](double f, int i) { return f / static_cast<double>(divisors[static_cast<std::size_t>(i)]); });
     },
     forget_scaling},
    {"yarn, trained on 64 positions",
     [](NaiveLlama& m) {
       m.architecture = "qwen2", m.bias = true;
       // A pair makes 64 f / 2 pi turns. 32 turns would be pair -3.97, 1 turn is pair 2.18: the ramp goes from 0 to 3.
       m.frequencies = frequencies([](double f, int i) {
         const double ramp = std::min(i / 3.0, 1.0);
         return f * (1.0 - ramp) + f / 6.0 * ramp;
       });
       m.magnitude = 0.1 * std::log(6.0) + 1.0;
       m.more_keys = [](io::test::GgufBuilder& b) {
         b.string("qwen2.rope.scaling.type", "yarn");
         b.number<float>("qwen2.rope.scaling.factor", io::test::kF32, 6.0f);
         b.number<std::uint32_t>("qwen2.rope.scaling.original_context_length", io::test::kU32, 64);
       };
     },
     [](NaiveLlama& m) { m.magnitude = 1.0; }},
};

// The largest difference of two rows of logits, relative to the largest logit of the second.
template <class Actual>
double distance(const Actual* actual, const std::vector<double>& expected) {
  double largest = 0.0, difference = 0.0;
  for (std::size_t v = 0; v < expected.size(); ++v) {
    largest = std::max(largest, std::fabs(expected[v]));
    difference = std::max(difference, std::fabs(static_cast<double>(actual[v]) - expected[v]));
  }
  return difference / largest;
}

TEST_P(DecoderOnBackend, MatchesTheNaiveModel) {
  static std::map<std::string, std::vector<NaiveLlama::Vector>> naive_logits;
  for (const ModelCase& item : kModelCases) {
    SCOPED_TRACE(item.name);
    NaiveLlama naive;
    item.make(naive);
    naive.fill();
    const io::test::ScratchDir scratch;
    const auto model = load_model(scratch.write("tiny.gguf", naive.gguf()), {.backend = GetParam(), .num_threads = 2});
    EXPECT_EQ(model->config().tie_word_embeddings, naive.tied);
    EXPECT_EQ(model->act_type(), ops::ActType::f32);
    const int length = item.forget == nullptr ? 290 : 150;  // 290: more than one split of 256
    const std::vector<int> ids = random_ids(length, naive.vocab);
    const Result actual = run(*model, ids, length, quant::KvFormat::f32);
    std::vector<NaiveLlama::Vector>& expected = naive_logits[item.name];  // the same for every backend
    if (expected.empty()) expected = naive.forward(ids);
    double worst = 0.0;
    for (std::size_t t = 0; t < ids.size(); ++t) {
      worst = std::max(worst, distance(actual.logits.data() + t * expected[t].size(), expected[t]));
      EXPECT_EQ(actual.greedy[t], std::max_element(expected[t].begin(), expected[t].end()) - expected[t].begin());
    }
    EXPECT_LE(worst, 1e-4);
    if (item.forget == nullptr) continue;
    if (GetParam() != "reference") continue;
    item.forget(naive);  // the test would be worth nothing if the fact made no difference
    EXPECT_GE(distance(naive.forward(ids).back().data(), expected.back()), 1e-2);
  }
}

// Promise 1 on the decoder: the slicing of a prompt changes no bit.
TEST_P(DecoderOnBackend, SlicesGiveTheSameBits) {
  NaiveLlama naive;
  naive.fill();
  NaiveLlama windowed = naive;
  windowed.window = 37;
  const io::test::ScratchDir scratch;
  const std::vector<int> ids = random_ids(290, naive.vocab);
  for (const std::string& path : {scratch.write("a.gguf", naive.gguf()), scratch.write("b.gguf", windowed.gguf())})
    for (quant::KvFormat format :
         some_of<quant::KvFormat>({quant::KvFormat::f32, quant::KvFormat::bf16, quant::KvFormat::f16,
                                   quant::KvFormat::int8, quant::KvFormat::mixed},
                                  2)) {
      const auto model = load_model(path, {.backend = GetParam(), .num_threads = 2});
      const Result whole = run(*model, ids, 290, format);
      const bool plain = format == quant::KvFormat::f32 || format == quant::KvFormat::bf16;
      for (int slice : plain ? some_of<int>({7, 1, 64, 256}, 4) : std::vector<int>{7}) {
        const Result sliced = run(*model, ids, slice, format);
        EXPECT_EQ(std::memcmp(sliced.logits.data(), whole.logits.data(), whole.logits.size() * sizeof(float)), 0)
            << "slices of " << slice;
        EXPECT_EQ(sliced.greedy, whole.greedy);
      }
    }
}

// A window behind sinks, and groups that become summaries: the naive model knows what each row may see, and no blocks.
TEST_P(DecoderOnBackend, FollowsKeyPolicies) {
  const std::vector<ops::KeyPolicy> policies = {{ops::KeyRule::window, 4, 60, 0, 0},
                                                {ops::KeyRule::summary, 32, 40, 32, 0}};
  NaiveLlama naive;
  naive.fill();
  const io::test::ScratchDir scratch;
  const auto model = load_model(scratch.write("tiny.gguf", naive.gguf()), {.backend = GetParam(), .num_threads = 2});
  if (!model->backend().kernels->key_policies) GTEST_SKIP() << "this backend refuses them";
  const std::vector<int> ids = random_ids(290, naive.vocab);
  const auto all = naive.forward(ids);
  for (const ops::KeyPolicy& policy : policies) {
    naive.shows = [&](int row, int key) { return ops::NaiveRow(policy, row).shows(key); };
    naive.period = policy.rule == ops::KeyRule::summary ? policy.period : 0, naive.delay = policy.window;
    const auto expected = naive.forward(ids);
    const Result whole = run(*model, ids, 290, quant::KvFormat::f32, &policy);
    for (std::size_t t = 0; t < ids.size(); ++t) {
      EXPECT_LE(distance(whole.logits.data() + t * expected[t].size(), expected[t]), 1e-4) << t;
    }
    EXPECT_GE(distance(all.back().data(), expected.back()), 1e-2);  // it does make a difference
    for (const quant::KvFormat format : {quant::KvFormat::f32, quant::KvFormat::mixed}) {
      const Result at_once = run(*model, ids, 290, format, &policy);
      for (const int slice : some_of<int>({37, 1}, 1)) {
        const Result sliced = run(*model, ids, slice, format, &policy);
        EXPECT_EQ(std::memcmp(sliced.logits.data(), at_once.logits.data(), at_once.logits.size() * sizeof(float)), 0)
            << quant::to_string(format) << ", slices of " << slice;
      }
    }
  }
}

// Keys that go elsewhere are not where summaries would be made from.
TEST_P(DecoderOnBackend, SummariesOfKeysThatAreWrittenApartAreRefused) {
  NaiveLlama naive;
  naive.fill();
  const io::test::ScratchDir scratch;
  const auto model = load_model(scratch.write("tiny.gguf", naive.gguf()), {.backend = GetParam()});
  kv::KvStorage storage({quant::KvFormat::f32, 2, 2, 16}, 2), written({quant::KvFormat::f32, 2, 2, 16}, 2);
  Workspace workspace(CachingPool::create());
  ops::ExecContext ctx{model->backend().kernels, &model->pool(), &workspace};
  StepInputs inputs;
  inputs.token_ids = {3, 1}, inputs.positions = {0, 1}, inputs.key_positions = {0, 1}, inputs.slots = {0, 1};
  inputs.blocks = {0}, inputs.runs = {{0, 2, 0}}, inputs.segments = {{0, 2, 0, 1}};
  inputs.summaries = {
      {.block_begin = 0, .first_key = 0, .num_tokens = 2, .position = 0, .slot = 16, .slot_position = 0}};
  Tensor hidden = model->decoder().embed(inputs, ctx);
  EXPECT_THROW(model->decoder().run_layers(hidden, 0, 2, inputs, storage, ctx, {}, &written), Error);
}

TEST_P(DecoderOnBackend, ForwardIsItsPieces) {
  NaiveLlama naive;
  naive.fill();
  const io::test::ScratchDir scratch;
  const auto model = load_model(scratch.write("tiny.gguf", naive.gguf()), {.backend = GetParam()});
  kv::KvStorage storage({quant::KvFormat::f32, 2, 2, 16}, 1);
  Workspace workspace(CachingPool::create());
  ops::ExecContext ctx{model->backend().kernels, &model->pool(), &workspace};
  StepInputs inputs;
  inputs.token_ids = {3, 1}, inputs.positions = {0, 1}, inputs.key_positions = {0, 1}, inputs.slots = {0, 1};
  inputs.blocks = {0}, inputs.runs = {{0, 2, 0}}, inputs.segments = {{0, 2, 0, 1}};
  const Tensor whole = model->decoder().forward(inputs, storage, ctx);
  Tensor pieces = model->decoder().embed(inputs, ctx);
  model->decoder().run_layers(pieces, 0, 1, inputs, storage, ctx);
  model->decoder().run_layers(pieces, 1, 2, inputs, storage, ctx);
  EXPECT_EQ(std::memcmp(whole.data, pieces.data, 2 * 48 * sizeof(float)), 0);
}

INSTANTIATE_TEST_SUITE_P(Backends, DecoderOnBackend, testing::ValuesIn(ops::available_backends()),
                         [](const auto& test) { return test.param; });

TEST(Model, TiledBackendsRefuseOddHeadSizes) {
  NaiveLlama naive;
  naive.dim = 12;
  naive.fill();
  const io::test::ScratchDir scratch;
  const std::string path = scratch.write("tiny.gguf", naive.gguf());
  EXPECT_NO_THROW(load_model(path, {.backend = "reference"}));
  try {
    load_model(path, {.backend = "scalar"});
    FAIL() << "head_dim 12 was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("12"), std::string::npos);
  }
}

TEST(Model, DefaultKvFormatFollowsTheBackend) {
  NaiveLlama naive;
  naive.fill();
  const io::test::ScratchDir scratch;
  const std::string path = scratch.write("tiny.gguf", naive.gguf());
  EXPECT_EQ(load_model(path, {.backend = "reference"})->default_kv_format(), quant::KvFormat::f32);
  EXPECT_EQ(load_model(path, {.backend = "scalar"})->default_kv_format(), quant::KvFormat::bf16);
}

}  // namespace
}  // namespace nb::model
