#include "model/loader.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "io/tensor_rows.h"
#include "model/host_layers.h"
#include "model/layer_file.h"
#include "model/load_progress.h"
#include "model/read_config.h"
#include "ops/pack_queue.h"
#include "quant/finite.h"
#include "quant/format.h"
#include "tensor/device_memory.h"

namespace nb::model {
namespace {

// Where row `row` of a half-split rotary head stands in a file that interleaves the pairs: HF rows (s, i), s the half
// and i the pair, are stored as (i, s).
std::int32_t interleaved_row(std::int32_t row, int head_dim) {
  const int within = row % head_dim, half = head_dim / 2;
  return row - within + 2 * (within % half) + within / half;
}

class Loader {
 public:
  Loader(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source, const std::string& dtype,
         const ops::Backend& backend, ThreadPool& pool)
      : config_(config),
        names_(names),
        source_(source),
        dtype_(dtype),
        backend_(backend),
        layout_(backend.kernels->layout),
        memory_(backend.kernels->memory),
        pool_(pool),
        arena_(HostArena::create()),
        queue_(layout_) {}

  ModelWeights run() {
    weights_.final_norm = vector(names_.final_norm, config_.hidden_size);
    pack_ends();
    weights_.layers.reserve(static_cast<std::size_t>(config_.num_layers));
    for (int i = 0; i < config_.num_layers; ++i) weights_.layers.push_back(layer(i));
    queue_.run(pool_, LoadProgress(config_.name));
    if (memory_ != nullptr) move_vectors(*memory_, weights_);  // which were put in order on the host
    arena_->trim();
    source_.release_pages();
    return std::move(weights_);
  }

  /// Within the budget of `options`: what does not fit is streamed from a file, which is made first if need be.
  ModelWeights run_streamed(const StreamingOptions& options) {
    NB_CHECK(memory_ == nullptr || options.cache_bytes == 0, invalid_argument,
             "streaming_config.cache_bytes limits a folder of packed layers, which ", memory_->name,
             " does not use, got ", options.cache_bytes);
    const int hidden = config_.hidden_size;
    std::vector<std::int64_t> layer_bytes;
    for (int i = 0; i < config_.num_layers; ++i) {
      weights_.layers.push_back(planned_layer(i));
      layer_bytes.push_back(room(blob_bytes(weights_.layers.back())));
    }
    weights_.final_norm = vector(names_.final_norm, hidden);
    std::int64_t order_total = order_bytes(weights_.layers);
    const auto planned_bytes = [&](const char* name) {
      const std::vector<ops::MatrixSource> group{matrix(name, config_.vocab_size, hidden)};
      const ops::LinearWeight planned = ops::plan_linear(group, ops::Grouping::stacked, dtype_, layout_);
      order_total += order_bytes(planned);
      return room(planned.bytes);
    };
    std::int64_t fixed_bytes = room(weights_.bytes - matrix_bytes(weights_.layers)) + planned_bytes(names_.embedding);
    if (!config_.tie_word_embeddings) fixed_bytes += planned_bytes(names_.head);
    fixed_bytes += order_total;
    const StreamPlan plan = plan_streaming(options, fixed_bytes, layer_bytes);
    if (plan.streamed.empty()) {
      weights_ = {};
      arena_ = HostArena::create();
      ModelWeights all = run();
      all.budget_bytes = options.budget_bytes;
      all.resident_bytes = plan.total_bytes;
      return all;
    }
    weights_.budget_bytes = options.budget_bytes > 0 ? options.budget_bytes : plan.total_bytes;
    weights_.resident_bytes = plan.total_bytes;
    if (memory_ != nullptr) {
      stream_from_host(plan);
    } else {
      stream_from_file(options, plan, plan.total_bytes - plan.num_slots * plan.slot_bytes - order_total);
    }
    return std::move(weights_);
  }

  /// Packs a layer as the blob it is in the file of layers.
  void run_blob(int index, std::span<std::byte> out) { pack_blob(index, planned_layer(index), out); }

  ModelWeights run_layer(int index) {
    weights_.layers.push_back(layer(index));
    queue_.run(pool_);
    return std::move(weights_);
  }

 private:
  static std::int64_t room(std::int64_t bytes) {
    return static_cast<std::int64_t>(io::blob_room(static_cast<std::uint64_t>(bytes)));
  }

  // Fills the memory that `plan` gives to what stays, `kept_bytes` without orders, and begins to stream the rest.
  void stream_from_file(const StreamingOptions& options, const StreamPlan& plan, std::int64_t kept_bytes) {
    const std::shared_ptr<const io::BlobFile> file =
        open_layer_file(options, config_.name, layout_, weights_.layers, [&](int index, std::span<std::byte> out) {
          pack_blob(index, weights_.layers[static_cast<std::size_t>(index)], out);
        });
    const auto reader = std::make_shared<LayerReader>(file, packs_again());
    arena_->trim();  // that of norms and biases
    arena_ = HostArena::create(static_cast<std::size_t>(kept_bytes));
    std::vector<std::pair<int, Buffer>> kept;
    for (int i = 0; i < config_.num_layers; ++i) {
      if (is_streamed(plan, i)) continue;
      const std::int64_t bytes = room(blob_bytes(weights_.layers[static_cast<std::size_t>(i)]));
      kept.emplace_back(i, arena_->allocate(static_cast<std::size_t>(bytes), io::kBlobAlignment));
    }
    for (const auto& [index, memory] : kept) {
      reader->read(index, {memory.data(), memory.bytes()});
      place_blob(weights_.layers[static_cast<std::size_t>(index)], memory.data());
      weights_.small.push_back(memory);
    }
    pack_ends();
    queue_.run(pool_, LoadProgress(config_.name));
    NB_ASSERT(arena_->stats().in_use_bytes <= static_cast<std::size_t>(kept_bytes));
    arena_->trim();
    source_.release_pages();
    stream(plan, {.direct = file->is_direct()},
           [reader](int index, std::span<std::byte> out) { reader->read(index, out); });
    log(LogLevel::info, config_.name, ": ", plan.streamed.size(), " of ", config_.num_layers,
        " layers are streamed from ", file->path(), file->is_direct() ? ", past the page cache" : "", "; weights take ",
        plan.total_bytes, " bytes of memory");
  }

  // The same on a device: the rest lies in host memory.
  void stream_from_host(const StreamPlan& plan) {
    move_vectors(*memory_, weights_);
    std::vector<std::int64_t> streamed_bytes;
    for (const int index : plan.streamed) {
      streamed_bytes.push_back(blob_bytes(weights_.layers[static_cast<std::size_t>(index)]));
    }
    const auto host = std::make_shared<HostLayers>(*memory_, streamed_bytes);
    LoadProgress progress(config_.name);
    std::int64_t done = 0;
    std::size_t position = 0;
    for (int i = 0; i < config_.num_layers; ++i) {
      LayerWeights& layer = weights_.layers[static_cast<std::size_t>(i)];
      if (is_streamed(plan, i)) {
        pack_blob(i, layer, host->blob(position++));
      } else {
        keep_on_device(i, layer);
      }
      progress(done += blob_bytes(layer), weights_.bytes);
    }
    host->pin();
    pack_ends();
    arena_->trim();
    source_.release_pages();
    stream(plan, {.direct = host->is_pinned(), .memory = memory_},
           [host, streamed = plan.streamed](int index, std::span<std::byte> out) {
             const auto at = std::lower_bound(streamed.begin(), streamed.end(), index) - streamed.begin();
             host->fetch(static_cast<std::size_t>(at), out);
           });
    log(host->is_pinned() ? LogLevel::info : LogLevel::warning, config_.name, ": ", plan.streamed.size(), " of ",
        config_.num_layers, " layers are streamed to ", memory_->name, " from ", host->bytes(),
        " bytes of host memory, ",
        host->is_pinned() ? "pinned" : "which the system does not pin, so that copies are slow", "; weights take ",
        plan.total_bytes, " bytes of the device");
  }

  void keep_on_device(int index, LayerWeights& layer) {
    const auto bytes = static_cast<std::size_t>(room(blob_bytes(layer)));
    const Buffer packed = HostArena::create(bytes)->allocate(bytes);
    pack_blob(index, layer, {packed.data(), bytes});
    weights_.small.push_back(copy_to(*memory_, packed.data(), bytes));
    place_blob(layer, weights_.small.back().data());
  }

  static bool is_streamed(const StreamPlan& plan, int index) {
    return std::binary_search(plan.streamed.begin(), plan.streamed.end(), index);
  }

  void pack_ends() {
    const auto pack_end = [this](const char* name) {
      return pack({matrix(name, config_.vocab_size, config_.hidden_size)});
    };
    weights_.embedding = pack_end(names_.embedding);
    if (!config_.tie_word_embeddings) weights_.head = pack_end(names_.head);
  }

  void stream(const StreamPlan& plan, LayerStream::Options options, LayerStream::Read read) {
    options.streamed = plan.streamed;
    options.num_slots = plan.num_slots;
    options.slot_bytes = static_cast<std::size_t>(plan.slot_bytes);
    weights_.stream = std::make_shared<LayerStream>(weights_.layers, std::move(options), std::move(read));
  }

  // What packs a layer when this loader is gone: it opens the model's file anew, and takes a thread of its own, since
  // the team computes.
  PackLayer packs_again() const {
    return [config = config_, &names = names_, path = source_.path(), dtype = dtype_, &backend = backend_](
               int index, std::span<std::byte> out) {
      const auto source = io::open_model(path);
      ThreadPool pool(1);
      Loader(config, names, *source, dtype, backend, pool).run_blob(index, out);
    };
  }

  // One fused group of a layer.
  struct Group {
    ops::LinearWeight LayerWeights::*matrix;
    std::vector<ops::MatrixSource> sources;
    ops::Grouping grouping = ops::Grouping::stacked;
  };

  LayerWeights layer(int index) {
    LayerWeights layer = vectors(index);
    for (Group& group : groups(index)) layer.*group.matrix = pack(std::move(group.sources), group.grouping);
    return layer;
  }

  // The same without the memory of its matrices.
  LayerWeights planned_layer(int index) {
    LayerWeights layer = vectors(index);
    for (const Group& group : groups(index)) {
      layer.*group.matrix = ops::plan_linear(group.sources, group.grouping, dtype_, layout_);
      if (memory_ != nullptr && !weights_.expanded) note_expansion(group.sources);
    }
    weights_.bytes += matrix_bytes(layer);
    return layer;
  }

  // Packs the matrices of a planned layer as a blob.
  void pack_blob(int index, LayerWeights layer, std::span<std::byte> out) {
    const std::vector<Group> parts = groups(index);
    std::size_t i = 0;
    for_blob(layer, [&](ops::LinearWeight& matrix, std::int64_t offset) {
      queue_.add(parts[i++].sources, matrix, reinterpret_cast<std::uint8_t*>(out.data()) + offset);
    });
    queue_.run(pool_);
  }

  LayerWeights vectors(int index) {
    const auto name = [&](const char* pattern) { return layer_name(pattern, index); };
    LayerWeights layer;
    layer.attention_norm = vector(name(names_.attention_norm), config_.hidden_size);
    if (config_.qkv_bias) {
      layer.q_bias = rotary_vector(name(names_.q_bias), config_.q_size());
      layer.k_bias = rotary_vector(name(names_.k_bias), config_.kv_size());
      layer.v_bias = vector(name(names_.v_bias), config_.kv_size());
    }
    if (config_.qk_norm) {
      layer.q_norm = rotary_vector(name(names_.q_norm), config_.head_dim);
      layer.k_norm = rotary_vector(name(names_.k_norm), config_.head_dim);
    }
    layer.ffn_norm = vector(name(names_.ffn_norm), config_.hidden_size);
    return layer;
  }

  // In the order of kLayerMatrices.
  std::vector<Group> groups(int index) {
    const auto name = [&](const char* pattern) { return layer_name(pattern, index); };
    const int hidden = config_.hidden_size, inner = config_.intermediate_size;
    ops::MatrixSource q = matrix(name(names_.q), config_.q_size(), hidden);
    ops::MatrixSource k = matrix(name(names_.k), config_.kv_size(), hidden);
    ops::MatrixSource v = matrix(name(names_.v), config_.kv_size(), hidden);
    if (config_.interleaved_qk_rows) {
      const int head_dim = config_.head_dim;
      q.file_row = k.file_row = [head_dim](std::int32_t row) { return interleaved_row(row, head_dim); };
    }
    ops::MatrixSource gate = matrix(name(names_.gate), inner, hidden), up = matrix(name(names_.up), inner, hidden);
    ops::MatrixSource down = matrix(name(names_.down), hidden, inner);
    if (down.order != nullptr) {
      // What enters it comes out of the two, whose rows can stand in any order: nothing is left to rearrange.
      gate.file_row = up.file_row = [order = std::exchange(down.order, nullptr)](std::int32_t row) {
        return (*order)[static_cast<std::size_t>(row)];
      };
    }
    return {{&LayerWeights::qkv, {q, k, v}},
            {&LayerWeights::attention_out, {matrix(name(names_.attention_out), hidden, config_.q_size())}},
            {&LayerWeights::gate_up, {gate, up}, ops::Grouping::interleaved32},
            {&LayerWeights::down, {down}}};
  }

  const io::TensorInfo& tensor(const std::string& name, std::vector<std::int64_t> shape) {
    const io::TensorInfo* info = source_.find(name);
    NB_CHECK(info != nullptr, format, "the model file has no tensor ", name);
    const auto text = [](const std::vector<std::int64_t>& dims) {
      std::string out = "[";
      for (std::size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
      return out + "]";
    };
    NB_CHECK(info->shape == shape, format, "tensor ", name, " has shape ", text(info->shape), ", expected ",
             text(shape));
    return *info;
  }

  // A vector of f32 values in memory that lives with the weights.
  Tensor vector(const std::string& name, int size) {
    const io::TensorInfo& info = tensor(name, {size});
    std::vector<std::byte> bytes(info.bytes);
    source_.read(info, 0, bytes);
    if (!quant::is_finite_row(*info.format, reinterpret_cast<const std::uint8_t*>(bytes.data()), size)) {
      warn_nonfinite(info);
    }
    Buffer buffer = arena_->allocate(static_cast<std::size_t>(size) * sizeof(float));
    quant::unpack_row(*info.format, reinterpret_cast<const std::uint8_t*>(bytes.data()), size, buffer.as<float>());
    weights_.small.push_back(buffer);
    weights_.bytes += static_cast<std::int64_t>(buffer.bytes());
    return Tensor(buffer.data(), DType::f32, {size});
  }

  // The same for values that belong to rows of Q or K, in the order of the packed rows.
  Tensor rotary_vector(const std::string& name, int size) {
    Tensor out = vector(name, size);
    if (!config_.interleaved_qk_rows) return out;
    float* values = out.as<float>();
    const std::vector<float> stored(values, values + size);
    for (std::int32_t row = 0; row < size; ++row) {
      values[row] = stored[static_cast<std::size_t>(interleaved_row(row, config_.head_dim))];
    }
    return out;
  }

  ops::MatrixSource matrix(const std::string& name, int rows, int cols) {
    const io::TensorInfo& info = tensor(name, {rows, cols});
    const std::int64_t row_bytes = quant::row_bytes(*info.format, cols);
    return {.name = name,
            .format = *info.format,
            .rows = rows,
            .cols = cols,
            .read_rows =
                [this, &info, row_bytes, cols, has_warned = std::make_shared<std::atomic<bool>>(false)](
                    std::int32_t begin, std::int32_t count, std::byte* out) {
                  source_.read(info, static_cast<std::uint64_t>(begin * row_bytes),
                               {out, static_cast<std::size_t>(count * row_bytes)});
                  for (std::int32_t i = 0; i < count; ++i) {
                    const auto* row = reinterpret_cast<const std::uint8_t*>(out) + i * row_bytes;
                    if (quant::is_finite_row(*info.format, row, cols)) continue;
                    refuse_nan_codes(info, row, cols);
                    if (!has_warned->exchange(true)) warn_nonfinite(info);
                  }
                },
            .file_row = {},
            .order = order(name, cols)};
  }

  // Kernels take every code of a matrix for a number.
  void refuse_nan_codes(const io::TensorInfo& info, const std::uint8_t* row, int cols) const {
    if (*info.format != quant::Format::fp8_e4m3) return;
    const int header = quant::format_info(*info.format).row_header_bytes;
    for (int i = 0; i < cols; ++i) {
      NB_CHECK((row[header + i] & 0x7f) != 0x7f, format, source_.path(), ": tensor ", info.name,
               " holds NaN among its fp8_e4m3 weights");
    }
  }

  // The order of a matrix's columns, if the file says one.
  ops::ColumnOrder order(const std::string& matrix_name, int cols) const {
    const std::string name = io::order_name(matrix_name);
    if (source_.find(name) == nullptr) return nullptr;
    NB_CHECK(matrix_name != names_.embedding, unsupported, source_.path(), ": tensor ", name,
             ": an embedding whose columns stand in another order is not offered");
    return std::make_shared<const std::vector<std::int32_t>>(io::read_order(source_, matrix_name, cols));
  }

  // Tells, once, that a matrix takes more memory on the device than in the file.
  void note_expansion(std::span<const ops::MatrixSource> group) {
    weights_.expanded = std::any_of(group.begin(), group.end(), [](const auto& source) {
      return !quant::format_info(source.format).is_plain() && ops::device_format(source) == quant::Format::bf16;
    });
    if (weights_.expanded) {
      log(LogLevel::info, source_.path(), ": quantized weights become bf16 on ", memory_->name,
          ", which has no kernels for them");
    }
  }

  // Answers of such a model are of no use, but whoever opens it may want to know why.
  void warn_nonfinite(const io::TensorInfo& info) const {
    log(LogLevel::warning, source_.path(), ": tensor ", info.name,
        " holds NaN or infinity; nanobraid inspect --check-tensors counts them");
  }

  // On the host, packed when all is known, see run. What goes to a device is packed at once, in memory of its own,
  // which is given back.
  ops::LinearWeight pack(std::vector<ops::MatrixSource> group, ops::Grouping grouping = ops::Grouping::stacked) {
    ops::LinearWeight weight;
    if (memory_ == nullptr) {
      weight = queue_.add(group, grouping, dtype_, *arena_);
    } else {
      weight = ops::pack_linear(group, grouping, dtype_, layout_, *HostArena::create(1), pool_);
      if (!weights_.expanded) note_expansion(group);
      ops::move_to(*memory_, weight);
    }
    weights_.bytes += weight.bytes;
    return weight;
  }

  const ModelConfig& config_;
  const TensorNames& names_;
  const io::ModelSource& source_;
  const std::string& dtype_;
  const ops::Backend& backend_;
  ops::WeightLayout layout_;
  const DeviceMemory* memory_;  // of the device the weights are for; null: the host
  ThreadPool& pool_;
  std::shared_ptr<HostArena> arena_;
  ops::PackQueue queue_;
  ModelWeights weights_;
};

}  // namespace

void move_vectors(const DeviceMemory& memory, ModelWeights& weights) {
  const auto move = [&](Tensor& tensor) {
    if (!tensor) return;
    weights.small.push_back(copy_to(memory, tensor.data, static_cast<std::size_t>(tensor.dim(0)) * sizeof(float)));
    tensor.data = weights.small.back().data();
  };
  const std::vector<Buffer> on_host = std::move(weights.small);  // until all are copied
  weights.small.clear();
  move(weights.final_norm);
  for (LayerWeights& layer : weights.layers) {
    for (Tensor* tensor : {&layer.attention_norm, &layer.q_bias, &layer.k_bias, &layer.v_bias, &layer.q_norm,
                           &layer.k_norm, &layer.ffn_norm}) {
      move(*tensor);
    }
  }
}

ModelWeights load_weights(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source,
                          const std::string& dtype, const ops::Backend& backend, ThreadPool& pool) {
  return Loader(config, names, source, dtype, backend, pool).run();
}

ModelWeights load_streamed_weights(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source,
                                   const std::string& dtype, const ops::Backend& backend, ThreadPool& pool,
                                   const StreamingOptions& streaming) {
  return Loader(config, names, source, dtype, backend, pool).run_streamed(streaming);
}

ModelWeights load_layer(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source,
                        const std::string& dtype, const ops::Backend& backend, ThreadPool& pool, int layer) {
  return Loader(config, names, source, dtype, backend, pool).run_layer(layer);
}

std::unique_ptr<Model> load_model(const io::ModelSource& source, const ModelOptions& options) {
  const ops::Backend& backend = ops::find_backend(options.backend);
  ModelConfig config = read_config(source);
  const Family& family = find_family(config.architecture);
  auto pool =
      std::make_unique<ThreadPool>(options.num_threads > 0 ? options.num_threads : ThreadPool::default_num_threads());
  ModelWeights weights = options.streaming ? load_streamed_weights(config, family.names, source, options.dtype, backend,
                                                                   *pool, *options.streaming)
                                           : load_weights(config, family.names, source, options.dtype, backend, *pool);
  log(LogLevel::info, "loaded ", config.name, ": ", config.num_layers, " layers, ", weights.bytes, " bytes packed for ",
      backend.kernels->name, ", ", pool->num_threads(), " threads");
  auto model = std::make_unique<Model>(std::move(config), std::move(weights), backend, std::move(pool),
                                       options.deterministic, options.fusion);
#if defined(__GLIBC__)
  // Opening a file and its tokenizer has taken megabytes that are free again, in the middle of the heap.
  ::malloc_trim(0);
#endif
  log(LogLevel::info, "operators: ", describe(model->fusion()));
  return model;
}

std::unique_ptr<Model> load_model(const std::string& path, const ModelOptions& options) {
  return load_model(*io::open_model(path), options);
}

}  // namespace nb::model
