// A random Llama-shaped model of two layers, built in memory, for tests above the operators.
//
// Its text means nothing, but its tokens depend on every earlier one, so that a wrong position, block or row shows.
// Weights are packed in a given format for a given backend. For tests only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/loader.h"
#include "model/model.h"
#include "quant/format.h"

namespace nb::model {

/// What a test may want to vary.
struct TinyModelOptions {
  std::string backend = "reference";
  std::string dtype = "auto";
  quant::Format format = quant::Format::f32;
  int num_threads = 1;
  int num_layers = 2;
  int vocab_size = 320;
  int max_position_embeddings = 512;
  unsigned seed = 1;
  const ops::Backend* device = nullptr;  ///< instead of `backend`
  bool deterministic = false;
  float qk_gain = 0.0f;  ///< norms of queries and keys with weights of about this; 0: none
  FusionOptions fusion{};
  int nan_token = -1;  ///< this embedding row is NaN (f32 format only): logits after it are NaN
};

inline ModelConfig tiny_config(const TinyModelOptions& options) {
  ModelConfig config;
  config.architecture = "llama";
  config.name = "tiny";
  config.num_layers = options.num_layers;
  config.hidden_size = 64;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.intermediate_size = 96;
  config.vocab_size = options.vocab_size;
  config.max_position_embeddings = options.max_position_embeddings;
  config.rms_norm_eps = 1e-5f;
  config.tie_word_embeddings = true;
  config.qk_norm = options.qk_gain > 0.0f;
  validate(config);
  return config;
}

/// Draws one matrix or vector after the other from one stream, so that a seed fixes the model whatever the backend.
class TinyWeights {
 public:
  TinyWeights(const TinyModelOptions& options, const ops::Backend& backend, ThreadPool& pool)
      : options_(options),
        backend_(backend),
        memory_(backend.kernels->memory),
        pool_(pool),
        arena_(HostArena::create()),
        random_(options.seed) {}

  ModelWeights build(const ModelConfig& config) {
    ModelWeights weights;
    weights.embedding = pack({matrix(config.vocab_size, config.hidden_size, options_.nan_token)});
    weights.final_norm = vector(weights, config.hidden_size);
    for (int i = 0; i < config.num_layers; ++i) {
      LayerWeights layer;
      layer.attention_norm = vector(weights, config.hidden_size);
      layer.qkv = pack({matrix(config.q_size(), config.hidden_size), matrix(config.kv_size(), config.hidden_size),
                        matrix(config.kv_size(), config.hidden_size)});
      if (config.qk_norm) layer.q_norm = vector(weights, config.head_dim, options_.qk_gain);
      if (config.qk_norm) layer.k_norm = vector(weights, config.head_dim, options_.qk_gain);
      layer.attention_out = pack({matrix(config.hidden_size, config.q_size())});
      layer.ffn_norm = vector(weights, config.hidden_size);
      layer.gate_up = pack(
          {matrix(config.intermediate_size, config.hidden_size), matrix(config.intermediate_size, config.hidden_size)},
          ops::Grouping::interleaved32);
      layer.down = pack({matrix(config.hidden_size, config.intermediate_size)});
      weights.layers.push_back(std::move(layer));
    }
    if (memory_ != nullptr) move_vectors(*memory_, weights);
    return weights;
  }

 private:
  ops::MatrixSource matrix(int rows, int cols, int nan_row = -1) {
    const std::int64_t row_bytes = quant::row_bytes(options_.format, cols);
    auto bytes = std::make_shared<std::vector<std::uint8_t>>(static_cast<std::size_t>(rows * row_bytes));
    std::vector<float> row(static_cast<std::size_t>(cols));
    std::normal_distribution<float> normal(0.0f, 2.0f / std::sqrt(static_cast<float>(cols)));
    for (int r = 0; r < rows; ++r) {
      for (float& value : row) value = normal(random_);
      if (r == nan_row) std::fill(row.begin(), row.end(), std::numeric_limits<float>::quiet_NaN());
      quant::pack_row(options_.format, row.data(), cols, bytes->data() + r * row_bytes);
    }
    return {.name = "tiny",
            .format = options_.format,
            .rows = rows,
            .cols = cols,
            .read_rows =
                [bytes, row_bytes](std::int32_t begin, std::int32_t count, std::byte* out) {
                  std::memcpy(out, bytes->data() + begin * row_bytes, static_cast<std::size_t>(count * row_bytes));
                },
            .file_row = {}};
  }

  Tensor vector(ModelWeights& weights, int size, float mean = 1.0f) {
    const Buffer buffer = arena_->allocate(static_cast<std::size_t>(size) * sizeof(float));
    std::normal_distribution<float> normal(mean, 0.1f * mean);
    for (int i = 0; i < size; ++i) buffer.as<float>()[i] = normal(random_);
    weights.small.push_back(buffer);
    return Tensor(buffer.data(), DType::f32, {size});
  }

  ops::LinearWeight pack(std::vector<ops::MatrixSource> group, ops::Grouping grouping = ops::Grouping::stacked) {
    ops::LinearWeight weight =
        ops::pack_linear(group, grouping, options_.dtype, backend_.kernels->layout, *arena_, pool_);
    if (memory_ != nullptr) ops::move_to(*memory_, weight);
    return weight;
  }

  const TinyModelOptions& options_;
  const ops::Backend& backend_;
  const DeviceMemory* memory_;
  ThreadPool& pool_;
  std::shared_ptr<HostArena> arena_;
  std::mt19937 random_;
};

inline std::unique_ptr<Model> make_tiny_model(const TinyModelOptions& options = {}) {
  const ops::Backend& backend = options.device != nullptr ? *options.device : ops::find_backend(options.backend);
  auto pool = std::make_unique<ThreadPool>(options.num_threads);
  ModelConfig config = tiny_config(options);
  ModelWeights weights = TinyWeights(options, backend, *pool).build(config);
  return std::make_unique<Model>(std::move(config), std::move(weights), backend, std::move(pool), options.deterministic,
                                 options.fusion);
}

}  // namespace nb::model
