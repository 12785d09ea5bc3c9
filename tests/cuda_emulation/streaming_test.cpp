// Models larger than the memory of their device: the answers of a resident one, within the budget.
#include <gtest/gtest.h>

#include <memory>
#include <optional>

#include "cuda_emulation/device_fixture.h"
#include "engine/engine.h"
#include "engine/engine_fixture.h"
#include "io/expect_error.h"
#include "io/gguf_source.h"
#include "model/loader.h"
#include "model/naive_llama.h"
#include "model/read_config.h"

namespace nb::engine {
namespace {

using io::test::expect_error;
using model::StreamingOptions;

class StreamedToDevice : public testing::TestWithParam<const ops::Backend*> {
 protected:
  StreamedToDevice() {
    naive_.layers = 6;
    naive_.architecture = "qwen2";
    naive_.bias = true;
    naive_.tied = false;
    naive_.fill();
    source_ = io::open_gguf(std::make_shared<const io::GgufFile>(bytes_ = naive_.gguf(), "tiny"));
  }

  model::ModelWeights weights_of(const std::optional<StreamingOptions>& streaming) const {
    const model::ModelConfig config = model::read_config(*source_);
    const model::TensorNames& names = model::find_family(config.architecture).names;
    ThreadPool pool(1);
    return streaming ? load_streamed_weights(config, names, *source_, "f32", *GetParam(), pool, *streaming)
                     : load_weights(config, names, *source_, "f32", *GetParam(), pool);
  }

  std::unique_ptr<model::Model> load(const std::optional<StreamingOptions>& streaming) const {
    return std::make_unique<model::Model>(model::read_config(*source_), weights_of(streaming), *GetParam(),
                                          std::make_unique<ThreadPool>(1));
  }

  std::vector<Answer> answers_of(const model::Model& model) const {
    Engine engine(model, {.kv_format = quant::KvFormat::f32, .max_num_seqs = 2, .max_batch_tokens = 24});
    std::vector<Request> requests;
    for (unsigned i = 0; i < 3; ++i) {
      requests.push_back(random_request(50 + i, 5 + 7 * static_cast<int>(i), 3, naive_.vocab));
    }
    return answer_all(engine, requests);
  }

  model::NaiveLlama naive_;
  io::test::Bytes bytes_;
  std::shared_ptr<const io::ModelSource> source_;
};

TEST_P(StreamedToDevice, GivesTheTokensOfAModelInItsMemory) {
  const std::vector<Answer> expected = answers_of(*load(std::nullopt));
  const StreamingOptions wishes[] = {
      {}, {.keep_first_k = 1, .keep_last_k = 2, .prefetch_layers = 1}, {.prefetch_layers = 4}};
  for (const StreamingOptions& streaming : wishes) {
    const auto streamed = load(streaming);
    const std::vector<Answer> answers = answers_of(*streamed);
    ASSERT_EQ(answers.size(), expected.size());
    for (std::size_t i = 0; i < answers.size(); ++i) EXPECT_EQ(answers[i].tokens, expected[i].tokens) << i;
    const model::StreamStats stats = streamed->weights().stream_stats();
    EXPECT_EQ(stats.layers, 6 - streaming.keep_first_k - streaming.keep_last_k);
    EXPECT_EQ(stats.slots, streaming.prefetch_layers + 1);
    EXPECT_TRUE(stats.direct);
    EXPECT_GT(stats.reads, stats.layers);
    EXPECT_EQ(stats.errors, 0);
  }
}

// Every allocation beyond the budget fails, so that whoever loads within it has never been above.
TEST_P(StreamedToDevice, TheBudgetIsOfTheMemoryOfTheDevice) {
  const std::size_t before = emulation::device_bytes_in_use();
  const std::int64_t least = weights_of(StreamingOptions{}).resident_bytes;
  const std::int64_t most = weights_of(std::nullopt).bytes;
  ASSERT_LT(least, most);
  expect_error(
      ErrorCode::invalid_argument, [&] { weights_of(StreamingOptions{.budget_bytes = least - 1}); },
      std::to_string(least - 1), std::to_string(least));
  int most_kept = 0;
  for (const std::int64_t budget : {least, (least + most) / 2, most + (1 << 20)}) {
    emulation::set_device_bytes(before + static_cast<std::size_t>(budget));
    const model::ModelWeights weights = weights_of(StreamingOptions{.budget_bytes = budget});
    EXPECT_LE(emulation::device_bytes_in_use() - before, static_cast<std::size_t>(budget));
    const model::StreamStats stats = weights.stream_stats();
    EXPECT_LE(stats.resident_bytes, budget);
    EXPECT_EQ(stats.budget_bytes, budget);
    EXPECT_GE(6 - stats.layers, most_kept);
    most_kept = 6 - stats.layers;
    emulation::set_device_bytes(std::size_t{4} << 30);
  }
  EXPECT_EQ(most_kept, 6);  // everything fits: nothing is streamed
  EXPECT_EQ(emulation::device_bytes_in_use(), before);
}

TEST_P(StreamedToDevice, ALimitOfAFolderIsRefusedSinceThereIsNone) {
  expect_error(
      ErrorCode::invalid_argument, [&] { weights_of(StreamingOptions{.cache_bytes = 1000}); }, "cache_bytes", "1000",
      GetParam()->kernels->memory->name);
}

INSTANTIATE_TEST_SUITE_P(All, StreamedToDevice, testing::Values(&emulation::reference_backend(), &emulation::backend()),
                         [](const auto& one) { return one.index == 0 ? "Reference" : "Emulated"; });

}  // namespace
}  // namespace nb::engine
