#include "model/calibration.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "io/tensor_rows.h"
#include "model/loader.h"
#include "model/read_config.h"
#include "tensor/allocator.h"

namespace nb::model {
namespace {

// Sums of squares by column, in double: the order of tokens hardly matters.
class ColumnSquares {
 public:
  void add(const Tensor& rows, std::int64_t cols) {
    sums_.resize(static_cast<std::size_t>(cols), 0.0);
    for (std::int64_t r = 0; r < rows.dim(0); ++r) {
      const float* row = rows.as<const float>() + r * rows.row_stride;
      for (std::size_t c = 0; c < sums_.size(); ++c) {
        sums_[c] += static_cast<double>(row[c]) * static_cast<double>(row[c]);
      }
    }
    num_rows_ += rows.dim(0);
  }

  std::vector<float> means() const {
    std::vector<float> out;
    for (const double sum : sums_) out.push_back(static_cast<float>(sum / static_cast<double>(num_rows_)));
    return out;
  }

 private:
  std::vector<double> sums_;
  std::int64_t num_rows_ = 0;
};

// Rows of a sequence that enter a layer together: more would only take more memory.
constexpr int kSliceRows = 64;

// Positions [begin, end) of a sequence whose KV stands in the blocks 0, 1, 2, ...
StepInputs slice_of_sequence(int begin, int end) {
  StepInputs inputs;
  inputs.token_ids.assign(static_cast<std::size_t>(end - begin), 0);  // the rows are embedded already
  for (int p = begin; p < end; ++p) {
    inputs.positions.push_back(p);
    inputs.key_positions.push_back(p);
    inputs.slots.push_back(p);
  }
  for (int b = 0; b * kBlockTokens < end; ++b) inputs.blocks.push_back(b);
  inputs.runs.push_back({0, end, 0});
  inputs.segments.push_back({0, end - begin, 0, 1});
  return inputs;
}

class Measurement {
 public:
  Measurement(const io::ModelSource& source, const ModelConfig& config, std::span<const TokenId> ids, int sequence_len,
              const ops::Backend& backend, ThreadPool& pool)
      : source_(source),
        config_(config),
        names_(find_family(config.architecture).names),
        ids_(ids),
        sequence_len_(sequence_len),
        backend_(backend),
        pool_(pool),
        workspace_(CachingPool::create()),
        ctx_{backend.kernels, &pool, &workspace_} {
    NB_CHECK(backend.kernels->memory == nullptr, unsupported, "inputs of matrices are measured on the CPU, not on ",
             backend.name);
    hidden_.resize(ids.size() * static_cast<std::size_t>(config.hidden_size));
    const io::TensorInfo& embedding = *source.find(names_.embedding);
    for (std::size_t t = 0; t < ids.size(); ++t) {
      io::read_rows(source, embedding, ids[t], 1, hidden_.data() + t * static_cast<std::size_t>(config.hidden_size));
    }
  }

  InputStatistics run(const io::ProgressFunction& progress) {
    const auto num_layers = static_cast<std::uint64_t>(config_.num_layers);
    InputStatistics out;
    ModelWeights weights;
    const Decoder decoder(config_, weights, sequence_len_);
    kv::KvStorage kv({quant::KvFormat::f32, 1, config_.num_kv_heads, config_.head_dim},
                     (sequence_len_ + kBlockTokens - 1) / kBlockTokens);
    for (int i = 0; i < config_.num_layers; ++i) {
      weights = {};  // before the next is packed: never two at once
      weights = load_layer(config_, names_, source_, "f32", backend_, pool_, i);
      out.layers.push_back(run_layer(decoder, weights.layers.front(), kv));
      if (progress) progress(static_cast<std::uint64_t>(i) + 1, num_layers);
    }
    ColumnSquares squares;
    std::vector<float> norm(static_cast<std::size_t>(config_.hidden_size));
    const io::TensorInfo* final_norm = source_.find(names_.final_norm);
    NB_CHECK(final_norm != nullptr && final_norm->shape == std::vector<std::int64_t>{config_.hidden_size}, format,
             source_.path(), ": there is no tensor ", names_.final_norm, " of ", config_.hidden_size, " values");
    io::read_rows(source_, *final_norm, 0, 1, norm.data());
    for_slices([&](Tensor rows, int, int) {
      add_normed(squares, rows, Tensor(norm.data(), DType::f32, {config_.hidden_size}));
    });
    out.head = squares.means();
    return out;
  }

 private:
  LayerStatistics run_layer(const Decoder& decoder, const LayerWeights& layer, kv::KvStorage& kv) {
    ColumnSquares qkv, attention_out, gate_up, down;
    const LayerObserver observer = [&](int, LayerInput input, Tensor rows) {
      switch (input) {
        case LayerInput::qkv:
          return add_normed(qkv, rows, layer.attention_norm);
        case LayerInput::attention_out:
          return attention_out.add(rows, config_.q_size());
        case LayerInput::gate_up:
          return add_normed(gate_up, rows, layer.ffn_norm);
        case LayerInput::down:
          return down.add(rows, config_.intermediate_size);
      }
    };
    for_slices([&](Tensor rows, int begin, int end) {
      for (BlockId block = 0; begin == 0 && block < kv.num_blocks(); ++block) kv.zero(block);
      decoder.run_layers(rows, 0, 1, slice_of_sequence(begin, end), kv, ctx_, observer);
    });
    return {qkv.means(), attention_out.means(), gate_up.means(), down.means()};
  }

  // Calls function(rows of the residual stream, first position in the sequence, last + 1) in order.
  template <class Function>
  void for_slices(const Function& function) {
    const int num_tokens = static_cast<int>(ids_.size());
    for (int sequence = 0; sequence < num_tokens; sequence += sequence_len_) {
      const int length = std::min(sequence_len_, num_tokens - sequence);
      for (int begin = 0; begin < length; begin += kSliceRows) {
        const int end = std::min(begin + kSliceRows, length);
        float* const rows = hidden_.data() + static_cast<std::ptrdiff_t>(sequence + begin) * config_.hidden_size;
        function(Tensor(rows, DType::f32, {end - begin, config_.hidden_size}), begin, end);
        workspace_.reset();
      }
    }
  }

  void add_normed(ColumnSquares& squares, const Tensor& rows, const Tensor& weight) {
    const Workspace::Scope scope(workspace_);
    Tensor normed(workspace_.allocate_array<float>(static_cast<std::size_t>(rows.dim(0) * rows.dim(1))), DType::f32,
                  {rows.dim(0), rows.dim(1)});
    ops::rms_norm(normed, rows, {weight, config_.rms_norm_eps}, ctx_);
    squares.add(normed, config_.hidden_size);
  }

  const io::ModelSource& source_;
  const ModelConfig& config_;
  const TensorNames& names_;
  std::span<const TokenId> ids_;
  int sequence_len_;
  const ops::Backend& backend_;
  ThreadPool& pool_;
  Workspace workspace_;
  ops::ExecContext ctx_;
  std::vector<float> hidden_;  // the residual stream of every token, [tokens, hidden_size]
};

}  // namespace

InputStatistics measure_inputs(const io::ModelSource& source, std::span<const TokenId> token_ids, int sequence_len,
                               const ops::Backend& backend, ThreadPool& pool, const io::ProgressFunction& progress) {
  const ModelConfig config = read_config(source);
  NB_CHECK(!token_ids.empty(), invalid_argument, "there are no tokens to measure with");
  NB_CHECK(sequence_len > 0 && sequence_len <= config.max_position_embeddings, invalid_argument, "sequences of ",
           sequence_len, " tokens, expected 1 to ", config.max_position_embeddings);
  for (const TokenId id : token_ids) {
    NB_CHECK(id >= 0 && id < config.vocab_size, invalid_argument, "token ", id, " is outside the vocabulary of ",
             config.vocab_size);
  }
  return Measurement(source, config, token_ids, sequence_len, backend, pool).run(progress);
}

}  // namespace nb::model
