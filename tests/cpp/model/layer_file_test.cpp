// layer_file.cpp and what the loader does with it: a streamed model gives the bits of a resident one.
#include "model/layer_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "io/expect_error.h"
#include "io/file_digest.h"
#include "kv/kv_storage.h"
#include "model/loader.h"
#include "model/naive_llama.h"
#include "model/read_config.h"
#include "ops/backends.h"
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

  static std::string content_of(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  // Changes one byte of the file of layers.
  void damage(std::int64_t offset) const {
    std::fstream file(files().front(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(offset);
    const char was = static_cast<char>(file.get());
    file.seekp(offset);
    file.put(static_cast<char>(was ^ 0x55));
  }

  void damage_layer(const Model& model, int layer) const {
    std::int64_t offset = io::kBlobAlignment + 100;
    for (int i = 0; i < layer; ++i) {
      const std::int64_t bytes = blob_bytes(model.weights().layers[static_cast<std::size_t>(i)]);
      offset += static_cast<std::int64_t>(io::blob_room(static_cast<std::uint64_t>(bytes)));
    }
    damage(offset);
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
  damage(20);  // its head
  expect_same(expected, *load(streaming()));
  std::filesystem::resize_file(files().front(), 5000);
  expect_same(expected, *load(streaming()));
}

TEST_P(Streaming, ADamagedLayerIsPackedAgain) {
  const std::vector<float> expected = hidden_states(*load(std::nullopt));
  load(streaming());
  const std::string file = files().front(), good = content_of(file);
  damage(4096 + 100);  // layer 0, which is kept, so it shows while loading
  expect_same(expected, *load(streaming(0, 1)));
  EXPECT_EQ(content_of(file), good);
  const std::unique_ptr<Model> model = load(streaming());
  hidden_states(*model);
  for (int layer = 0; layer < 5; ++layer) damage_layer(*model, layer);
  EXPECT_NE(content_of(file), good);
  expect_same(expected, *model);
  expect_same(expected, *model);
  EXPECT_EQ(content_of(file), good);
  EXPECT_EQ(model->weights().stream_stats().errors, 0);
  // Damaged once more, the disk is to blame; whoever loads next has a good one.
  for (int layer = 0; layer < 5; ++layer) damage_layer(*model, layer);
  expect_error(
      ErrorCode::format, [&] { hidden_states(*model); }, "is damaged", "was packed again before",
      "load the model again", "streaming_config", "cache_dir");
  EXPECT_FALSE(std::filesystem::exists(file));
  expect_same(expected, *load(streaming()));
  EXPECT_EQ(content_of(file), good);
}

TEST_P(Streaming, AFileCutOffWhileItIsReadIsFilledAgain) {
  const std::vector<float> expected = hidden_states(*load(std::nullopt));
  const std::unique_ptr<Model> model = load(streaming());
  const std::string good = content_of(files().front());
  std::filesystem::resize_file(files().front(), 5000);
  expect_same(expected, *model);
  expect_same(expected, *model);
  EXPECT_EQ(content_of(files().front()), good);
}

TEST_P(Streaming, ADamagedLayerOfAModelThatIsGoneIsAnError) {
  for (const bool replaced : {false, true}) {
    const std::unique_ptr<Model> model = load(streaming());
    hidden_states(*model);
    for (int layer = 0; layer < 5; ++layer) damage_layer(*model, layer);
    std::filesystem::rename(path_, path_ + ".old");
    NaiveLlama other = naive_;
    other.tensors["blk.2.attn_q.weight"].front() += 1.0F;
    for (int layer = 0; layer < 5; ++layer) {
      other.tensors[concat("blk.", layer, ".ffn_down.weight")].back() += 1.0F;
    }
    if (replaced) dir_.write("tiny.gguf", other.gguf());
    expect_error(
        ErrorCode::format, [&] { hidden_states(*model); }, "is damaged", "could not be packed again",
        replaced ? "something else" : path_, "load the model again");
    EXPECT_TRUE(files().empty());
    std::filesystem::rename(path_ + ".old", path_);
  }
}

TEST_P(Streaming, TheFolderHasALimit) {
  load(streaming());
  const auto bytes = static_cast<std::int64_t>(std::filesystem::file_size(files().front()));
  StreamingOptions other = streaming();
  other.content[0] ^= std::byte{1};
  other.cache_bytes = bytes - 1;
  expect_error(
      ErrorCode::invalid_argument, [&] { load(other); }, "streaming_config.cache_bytes", std::to_string(bytes - 1),
      std::to_string(bytes));
  other.cache_bytes = 2 * bytes;
  load(other);
  EXPECT_EQ(files().size(), 2u);
  {
    const std::unique_ptr<Model> user = load(streaming());
    StreamingOptions third = other;
    third.content[1] ^= std::byte{1};
    third.cache_bytes = 2 * bytes - 1;
    expect_error(
        ErrorCode::invalid_argument, [&] { load(third); }, "streaming_config.cache_bytes", "in use",
        std::to_string(bytes));
    EXPECT_EQ(files().size(), 1u);  // that of the model that is loaded
  }
  other.cache_bytes = bytes;
  load(other);
  EXPECT_EQ(files().size(), 1u);
  other.cache_bytes = -1;
  expect_error(
      ErrorCode::invalid_argument, [&] { load(other); }, "streaming_config.cache_bytes", "-1");
}

// Of four bytes a column, which are there whatever is streamed.
TEST_P(Streaming, OrdersOfColumnsCount) {
  const StreamingOptions plain = streaming();
  const std::int64_t least = load(plain)->weights().resident_bytes;
  const std::int64_t whole = load(streaming(std::int64_t{1} << 40))->weights().resident_bytes;
  const auto add_order = [&](const std::string& name, int cols, int shift) {
    naive_.add(name, 1, cols, 0.0);
    for (int i = 0; i < cols; ++i)
      naive_.tensors[name][static_cast<std::size_t>(i)] = static_cast<float>((i + shift) % cols);
  };
  const int hidden = naive_.hidden, inner = naive_.inner;
  for (const char* matrix : {"attn_q", "attn_k", "attn_v"}) add_order(concat("blk.1.", matrix, ".order"), hidden, 3);
  add_order("blk.3.attn_v.order", hidden, 1);
  add_order("blk.3.attn_q.order", hidden, 2);
  add_order("blk.3.attn_output.order", naive_.heads * naive_.dim, 5);
  add_order("blk.2.ffn_down.order", inner, 1);  // goes into rows, so that nothing is left of it
  add_order("output.order", hidden, 7);
  path_ = dir_.write("ordered.gguf", naive_.gguf());
  content_ = io::model_digest(*io::open_model(path_));
  const std::int64_t orders = 4 * (4 * hidden + naive_.heads * naive_.dim);
  EXPECT_EQ(load(streaming())->weights().resident_bytes, least + orders);
  EXPECT_EQ(load(streaming(std::int64_t{1} << 40))->weights().resident_bytes, whole + orders);
  expect_error(
      ErrorCode::invalid_argument, [&] { load(streaming(least + orders - 1)); }, std::to_string(least + orders),
      "column orders");
  const std::vector<float> expected = hidden_states(*load(std::nullopt));
  for (const std::int64_t budget : {least + orders, whole + orders - 1}) {
    const std::unique_ptr<Model> model = load(streaming(budget));
    ASSERT_NE(model->weights().stream, nullptr);
    EXPECT_LE(model->weights().resident_bytes, budget);
    expect_same(expected, *model);
  }
  EXPECT_EQ(load(streaming(whole + orders))->weights().stream, nullptr);
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
