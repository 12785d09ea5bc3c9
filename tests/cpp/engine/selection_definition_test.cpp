#include "engine/selection_runner.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "base/error.h"
#include "engine/batch_builder.h"
#include "engine/engine_fixture.h"
#include "ops/ops_fixture.h"

namespace nb::engine {
namespace {

constexpr int kHeads = 2, kDim = 16, kBlocks = 64;  // of the tiny model

/// A prompt with two chunks, plain tokens around and between them; its chunks and its beginning are computed.
class SelectionFixture {
 public:
  explicit SelectionFixture(int num_layers = 2)
      : model_(model::make_tiny_model({.num_layers = num_layers})),
        pool_(kBlocks),
        chunks_(pool_),
        storage_({quant::KvFormat::f32, num_layers, kHeads, kDim}, kBlocks),
        workspace_(CachingPool::create()) {
    Request request = random_request(1, 5 + 21 + 4 + 16 + 3, 1);
    request.chunks = {{.begin = 5, .count = 21, .anchor = random_request(2, 18, 1).prompt},
                      {.begin = 30, .count = 16, .anchor = {}}};
    request.reuse = {.mode = ReuseMode::blend, .ratio = 0.3};
    prompt = request.prompt;
    sequence = std::make_unique<Sequence>(1, request, std::span<const TokenId>{}, 200);
    for (PlacedChunk& placed : sequence->composition->chunks()) {
      const ChunkSpan& span = request.chunks[static_cast<std::size_t>(placed.span)];
      std::vector<TokenId> tokens(prompt.begin() + span.begin, prompt.begin() + span.begin + span.count);
      placed.id = chunks_.create(kv::ChunkStore::content({}, span.anchor, tokens));
      tokens.insert(tokens.begin(), span.anchor.begin(), span.anchor.end());
      std::vector<BlockId> freed;
      chunks_.complete(placed.id, compute(tokens), freed);
    }
    // The beginning, in blocks that the sequence owns; room for what the runner stores.
    sequence->table.reserve(pool_, sequence->num_own_prompt());
    for (const BlockId block : sequence->table.grow_to(sequence->num_own_prompt())) storage_.zero(block);
    const std::vector<TokenId> lead(prompt.begin(), prompt.begin() + 5);
    compute(lead, {sequence->table.blocks().begin(), sequence->table.blocks().end()});
  }

  /// Measures the chunks' tokens in slices of `slice`.
  std::vector<float> measure(int slice) {
    Composition& composition = *sequence->composition;
    SelectionRunner runner(*model_);
    ops::ExecContext ctx{&model_->kernels(), &model_->pool(), &workspace_};
    std::vector<float> found;
    while (composition.selecting()) {
      const int first = composition.num_measured();
      const int count = std::min(slice, composition.num_chunk_tokens() - first);
      runner.run({.sequence = sequence.get(), .first = 5, .count = count, .samples = false, .selects = true}, storage_,
                 chunks_, ctx);
      const auto all = composition.deviations();
      found.insert(found.end(), all.begin() + first, all.begin() + first + count);
      if (first + count == composition.num_chunk_tokens()) break;  // choosing is not what is tested
      composition.measured(count);
    }
    return found;
  }

  /// The definition, in double: keys of the second layer as they are in the whole prompt, turned back to where the
  /// chunk has them, against those of the chunk.
  std::vector<double> expected() {
    const std::vector<BlockId> whole = compute(prompt);
    std::vector<double> deviations;
    for (const PlacedChunk& chunk : sequence->composition->chunks()) {
      for (int i = 0; i < chunk.count; ++i) {
        const std::vector<double> stored = key_at(chunks_.get(chunk.id).blocks, chunk.anchor_len + i, 0);
        const std::vector<double> wanted = key_at(whole, chunk.begin + i, chunk.begin - chunk.anchor_len);
        double sum = 0.0;
        for (std::size_t d = 0; d < stored.size(); ++d) sum += (wanted[d] - stored[d]) * (wanted[d] - stored[d]);
        deviations.push_back(sum);
      }
    }
    return deviations;
  }

  std::vector<TokenId> prompt;
  std::unique_ptr<Sequence> sequence;

 private:
  /// Computes tokens at positions from 0 on, in blocks of their own if none are given.
  std::vector<BlockId> compute(const std::vector<TokenId>& tokens, std::vector<BlockId> blocks = {}) {
    const int count = static_cast<int>(tokens.size());
    if (blocks.empty()) {
      EXPECT_TRUE(pool_.allocate(kv::BlockTable::blocks_for(count), blocks));
      for (const BlockId block : blocks) storage_.zero(block);
    }
    model::StepInputs inputs;
    inputs.token_ids = tokens;
    inputs.positions.resize(tokens.size());
    std::iota(inputs.positions.begin(), inputs.positions.end(), 0);
    inputs.key_positions = inputs.positions;
    for (int i = 0; i < count; ++i) inputs.slots.push_back(blocks[static_cast<std::size_t>(i / 16)] * 16 + i % 16);
    inputs.blocks.assign(blocks.begin(), blocks.end());
    inputs.runs = {{.block_begin = 0, .num_keys = count, .position_offset = 0}};
    inputs.segments = {{.row_begin = 0, .row_count = count, .run_begin = 0, .run_count = 1}};
    workspace_.reset();
    ops::ExecContext ctx{&model_->kernels(), &model_->pool(), &workspace_};
    model_->decoder().forward(inputs, storage_, ctx);
    return blocks;
  }

  /// The key of the second layer of token `index` of some blocks, all heads, rotated back by `turn` positions.
  std::vector<double> key_at(std::span<const BlockId> blocks, int index, int turn) const {
    const ops::KvLayer layer = storage_.layer(1);
    std::vector<double> key;
    for (int head = 0; head < kHeads; ++head) {
      const auto* cell = reinterpret_cast<const float*>(
          layer.base + blocks[static_cast<std::size_t>(index / 16)] * layer.block_stride + head * layer.key_cell_bytes);
      const float* values = cell + index % 16 * kDim;  // as the reference has them
      std::vector<double> turned(kDim);
      for (int i = 0; i < kDim / 2; ++i) {
        const double angle = -turn * std::pow(10000.0, -2.0 * i / kDim);
        const double x = values[i], y = values[i + kDim / 2];
        turned[static_cast<std::size_t>(i)] = x * std::cos(angle) - y * std::sin(angle);
        turned[static_cast<std::size_t>(i + kDim / 2)] = x * std::sin(angle) + y * std::cos(angle);
      }
      key.insert(key.end(), turned.begin(), turned.end());
    }
    return key;
  }

  std::unique_ptr<model::Model> model_;
  kv::BlockPool pool_;
  kv::ChunkStore chunks_;
  kv::KvStorage storage_;
  Workspace workspace_;
};

TEST(SelectionRunner, MeasuresHowFarKeysAreFromThoseOfTheWholePrompt) {
  for (const int slice : {100, 37, 21, 8, 1}) {
    SelectionFixture fixture;
    const std::vector<float> found = fixture.measure(slice);
    const std::vector<double> expected = fixture.expected();
    ASSERT_EQ(found.size(), 37U);
    ASSERT_EQ(expected.size(), 37U);
    const double largest = *std::max_element(expected.begin(), expected.end());
    EXPECT_GT(largest, 0.1) << "nothing deviates";
    for (std::size_t i = 0; i < found.size(); ++i) {
      EXPECT_NEAR(found[i], expected[i], 1e-4 * largest) << "token " << i << " in slices of " << slice;
    }
  }
}

TEST(SelectionRunner, RefusesAModelOfOneLayer) {
  SelectionFixture fixture(1);
  try {
    fixture.measure(10);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
  }
}

}  // namespace
}  // namespace nb::engine
