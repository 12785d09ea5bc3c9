// decoder.cpp and model.cpp against the naive model, through the loader.
#include "model/decoder.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "model/loader.h"
#include "model/naive_llama.h"

namespace nb::model {
namespace {

// Feeds `ids` as one sequence in slices of `slice` tokens; returns logits of every position and the greedy tokens.
struct Result {
  std::vector<float> logits;
  std::vector<TokenId> greedy;
};

Result run(const Model& model, const std::vector<int>& ids, int slice, quant::KvFormat format) {
  const ModelConfig& config = model.config();
  const int num_blocks = static_cast<int>(ids.size()) / kBlockTokens + 2;
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

TEST_P(DecoderOnBackend, MatchesTheNaiveModel) {
  for (bool tied : {true, false}) {
    NaiveLlama naive;
    naive.tied = tied;
    naive.fill();
    const io::test::ScratchDir scratch;
    const auto model = load_model(scratch.write("tiny.gguf", naive.gguf()), {.backend = GetParam(), .num_threads = 2});
    EXPECT_EQ(model->config().tie_word_embeddings, tied);
    EXPECT_EQ(model->act_type(), ops::ActType::f32);
    const std::vector<int> ids = random_ids(290, naive.vocab);  // more than one split of 256
    const Result actual = run(*model, ids, 290, quant::KvFormat::f32);
    const auto expected = naive.forward(ids);
    double worst = 0.0;
    for (std::size_t t = 0; t < ids.size(); ++t) {
      double largest = 0.0, difference = 0.0;
      for (std::size_t v = 0; v < expected[t].size(); ++v) {
        largest = std::max(largest, std::fabs(expected[t][v]));
        difference = std::max(difference, std::fabs(actual.logits[t * expected[t].size() + v] - expected[t][v]));
      }
      worst = std::max(worst, difference / largest);
      EXPECT_EQ(actual.greedy[t], std::max_element(expected[t].begin(), expected[t].end()) - expected[t].begin());
    }
    EXPECT_LE(worst, 1e-4);
  }
}

// Promise 1 on the decoder: the slicing of a prompt changes no bit.
TEST_P(DecoderOnBackend, SlicesGiveTheSameBits) {
  NaiveLlama naive;
  naive.fill();
  const io::test::ScratchDir scratch;
  const std::string path = scratch.write("tiny.gguf", naive.gguf());
  const std::vector<int> ids = random_ids(290, naive.vocab);
  for (quant::KvFormat format : {quant::KvFormat::f32, quant::KvFormat::bf16}) {
    const auto model = load_model(path, {.backend = GetParam(), .num_threads = 2});
    const Result whole = run(*model, ids, 290, format);
    for (int slice : {1, 7, 64, 256}) {
      const Result sliced = run(*model, ids, slice, format);
      EXPECT_EQ(std::memcmp(sliced.logits.data(), whole.logits.data(), whole.logits.size() * sizeof(float)), 0)
          << "slices of " << slice;
      EXPECT_EQ(sliced.greedy, whole.greedy);
    }
  }
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
