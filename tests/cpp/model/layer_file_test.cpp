// layer_file.cpp and what the loader does with it: a streamed model gives the bits of a resident one.
#include "model/layer_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "io/expect_error.h"
#include "io/file_digest.h"
#include "kv/kv_storage.h"
#include "model/loader.h"
#include "model/naive_llama.h"
#include "ops/backends.h"
#include "tensor/device_memory.h"
#include "tensor/workspace.h"

namespace nb::model {
namespace {

using io::test::expect_error;

constexpr int kTokens = 21;

class Streaming : public testing::TestWithParam<std::string> {
 protected:
  explicit Streaming(const char* architecture = "qwen2") {
    naive_.layers = 5;
    naive_.architecture = architecture;
    naive_.bias = naive_.architecture == "qwen2";
    naive_.tied = false;
    naive_.fill();
    path_ = dir_.write("tiny.gguf", naive_.gguf());
    content_ = io::model_digest(*io::open_model(path_));
  }

  StreamingOptions streaming(std::int64_t budget = 0, int first = 0, int last = 0, int prefetch = 1) const {
    return {.budget_bytes = budget,
            .keep_first_k = first,
            .keep_last_k = last,
            .prefetch_layers = prefetch,
            .cache_directory = dir_.path("layers"),
            .content = content_};
  }

  std::unique_ptr<Model> load(const std::optional<StreamingOptions>& options) const {
    return load_model(path_, {.backend = GetParam(), .num_threads = 2, .streaming = options});
  }

  // Everything the files of layers in the cache are called.
  std::vector<std::string> files() const {
    std::vector<std::string> out;
    if (!std::filesystem::exists(dir_.path("layers"))) return out;
    for (const auto& entry : std::filesystem::directory_iterator(dir_.path("layers"))) {
      if (entry.path().extension() == ".layers") out.push_back(entry.path().string());
    }
    return out;
  }

  // The residual stream behind the layers, of a prompt and then of one token.
  std::vector<float> hidden_states(const Model& model) const {
    Workspace workspace(CachingPool::create());
    ops::ExecContext ctx{&model.kernels(), &model.pool(), &workspace};
    kv::KvStorage kv(
        {quant::KvFormat::f32, model.config().num_layers, model.config().num_kv_heads, model.config().head_dim}, 2);
    std::vector<float> out;
    const auto step = [&](int begin, int end) {
      StepInputs inputs;
      for (int p = begin; p < end; ++p) {
        inputs.token_ids.push_back(static_cast<TokenId>((7 * p + 3) % naive_.vocab));
        inputs.positions.push_back(p);
        inputs.key_positions.push_back(p);
        inputs.slots.push_back(p);
      }
      inputs.blocks = {0, 1};
      inputs.runs.push_back({0, end, 0});
      inputs.segments.push_back({0, end - begin, 0, 1});
      const Tensor hidden = model.decoder().forward(inputs, kv, ctx);
      const float* const values = hidden.as<const float>();
      out.insert(out.end(), values, values + hidden.dim(0) * hidden.dim(1));
      workspace.reset();
    };
    step(0, kTokens - 2);
    step(kTokens - 2, kTokens - 1);
    step(kTokens - 1, kTokens);
    return out;
  }

  void expect_same(const std::vector<float>& expected, const Model& model) const {
    const std::vector<float> actual = hidden_states(model);
    ASSERT_EQ(actual.size(), expected.size());
    EXPECT_EQ(std::memcmp(actual.data(), expected.data(), expected.size() * sizeof(float)), 0);
  }

  io::test::ScratchDir dir_;
  NaiveLlama naive_;
  std::string path_;
  Digest content_{};
};

TEST_P(Streaming, GivesTheBitsOfResidentLayers) {
  const std::unique_ptr<Model> resident = load(std::nullopt);
  const std::vector<float> expected = hidden_states(*resident);
  EXPECT_EQ(resident->weights().stream, nullptr);
  for (const StreamingOptions& options : {streaming(), streaming(0, 1, 1), streaming(0, 0, 0, 3), streaming(0, 2, 2)}) {
    const std::unique_ptr<Model> model = load(options);
    ASSERT_NE(model->weights().stream, nullptr);
    EXPECT_EQ(model->weights().bytes, resident->weights().bytes);
    EXPECT_EQ(model->act_type(), resident->act_type());
    expect_same(expected, *model);
    expect_same(expected, *model);  // again, from what the last step left in the slots
    const int num_streamed = 5 - options.keep_first_k - options.keep_last_k;
    EXPECT_EQ(model->weights().stream_stats().layers, num_streamed);
  }
  EXPECT_EQ(files().size(), 1u);  // whatever is kept, the file is the same
}

TEST_P(Streaming, StaysWithinTheBudget) {
  const std::vector<float> expected = hidden_states(*load(std::nullopt));
  const std::int64_t least = load(streaming())->weights().resident_bytes;
  expect_error(
      ErrorCode::invalid_argument, [&] { load(streaming(least - 1)); }, std::to_string(least - 1),
      std::to_string(least));
  int fewest = 5;
  for (std::int64_t budget = least; fewest > 0; budget += 16384) {
    const std::unique_ptr<Model> model = load(streaming(budget));
    const ModelWeights& weights = model->weights();
    ASSERT_LE(weights.resident_bytes, budget);
    // What the budget is about is all there is: slots and kept blobs, counted one by one.
    std::int64_t kept = 0;
    for (int i = 0; i < 5; ++i) {
      const LayerWeights& layer = weights.layers[static_cast<std::size_t>(i)];
      const bool is_there = layer.qkv.segments.front().data != nullptr;
      ASSERT_EQ(is_there, weights.stream == nullptr || !weights.stream->has(i));
      if (is_there) kept += static_cast<std::int64_t>(io::blob_room(static_cast<std::uint64_t>(blob_bytes(layer))));
    }
    const StreamStats stats = weights.stream_stats();
    const auto slot =
        static_cast<std::int64_t>(io::blob_room(static_cast<std::uint64_t>(blob_bytes(weights.layers[0]))));
    ASSERT_LE(kept + stats.slots * slot + weights.embedding.bytes + weights.head.bytes, budget);
    if (stats.layers < fewest) expect_same(expected, *model);
    ASSERT_LE(stats.layers, fewest);
    fewest = stats.layers;
  }
}

TEST_P(Streaming, AnotherContentHasAnotherFile) {
  load(streaming());
  StreamingOptions other = streaming();
  other.content[0] ^= std::byte{1};
  load(other);
  EXPECT_EQ(files().size(), 2u);
}

TEST_P(Streaming, ADamagedFileIsMadeAgain) {
  const std::vector<float> expected = hidden_states(*load(std::nullopt));
  load(streaming());
  const auto damage = [&](std::int64_t offset) {
    std::fstream file(files().front(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(offset);
    file.put('\x55');
  };
  damage(20);  // its head
  expect_same(expected, *load(streaming()));
  damage(4096 + 100);  // layer 0, which is kept, so it shows while loading
  expect_same(expected, *load(streaming(0, 1)));
  // A streamed layer: its step fails, and whoever loads next has a good one.
  damage(4096 + 100);
  const std::unique_ptr<Model> broken = load(streaming());
  expect_error(
      ErrorCode::format, [&] { hidden_states(*broken); }, "blob 0", "made again");
  expect_same(expected, *load(streaming()));
  std::filesystem::resize_file(files().front(), 5000);
  expect_same(expected, *load(streaming()));
}

TEST_P(Streaming, RefusesByName) {
  StreamingOptions nowhere = streaming();
  nowhere.cache_directory.clear();
  expect_error(
      ErrorCode::invalid_argument, [&] { load(nowhere); }, "cache_directory");
  nowhere.cache_directory = path_ + "/folder";
  expect_error(
      ErrorCode::io, [&] { load(nowhere); }, "tiny.gguf/folder");
  expect_error(
      ErrorCode::invalid_argument, [&] { load(streaming(0, 6)); }, "keep_first_k", "6");
}

INSTANTIATE_TEST_SUITE_P(All, Streaming, testing::ValuesIn(ops::available_backends()),
                         [](const auto& one) { return one.param; });

TEST_P(Streaming, RefusesADeviceByName) {
  DeviceMemory memory{};
  memory.name = "cuda:0";
  ops::KernelTable table = *ops::find_backend("reference").kernels;
  table.memory = &memory;
  const ops::Backend device{
      .name = "cuda:0", .kernels = &table, .deterministic = &table, .device = {}, .hardware = "", .why_not = ""};
  const auto source = io::open_model(path_);
  const ModelConfig config = read_config(*source);
  ThreadPool pool(1);
  const auto load_on_device = [&] {
    load_streamed_weights(config, find_family(config.architecture).names, *source, "f32", device, pool, streaming());
  };
  expect_error(ErrorCode::unsupported, load_on_device, "streaming_config", "cuda:0");
}

// What decides about fused operators when a model is loaded sees the same layers.
TEST_P(Streaming, FusionIsMeasuredAsInMemory) {
  const auto errors_of = [&](const std::optional<StreamingOptions>& options) {
    const FusionOptions fusion{.measure = true};
    return load_model(path_, {.backend = GetParam(), .num_threads = 2, .fusion = fusion, .streaming = options})
        ->fusion()
        .errors;
  };
  const std::vector<FusionError> expected = errors_of(std::nullopt), actual = errors_of(streaming());
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    EXPECT_EQ(actual[i].error, expected[i].error);
    EXPECT_EQ(actual[i].layer, expected[i].layer);
  }
}

// The rows of Q and K stand in another order in files of this family.
class StreamingLlama : public Streaming {
 protected:
  StreamingLlama() : Streaming("llama") {}
};

TEST_P(StreamingLlama, GivesTheBitsOfResidentLayers) {
  expect_same(hidden_states(*load(std::nullopt)), *load(streaming()));
}

INSTANTIATE_TEST_SUITE_P(All, StreamingLlama, testing::ValuesIn(ops::available_backends()),
                         [](const auto& one) { return one.param; });

}  // namespace
}  // namespace nb::model
