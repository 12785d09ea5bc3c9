#include "model/fusion.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <sstream>

#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "model/rope.h"
#include "ops/ops.h"
#include "tensor/device_memory.h"
#include "tensor/workspace.h"

namespace nb::model {
namespace {

constexpr int kRows = 4;
constexpr unsigned kSeed = 1;

// The same bits differ by nothing, NaN too; a NaN against a number by infinity.
double difference(float a, float b) {
  if (std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b))) return 0.0;
  const double found = std::fabs(static_cast<double>(a) - static_cast<double>(b));
  return std::isnan(found) ? std::numeric_limits<double>::infinity() : found;
}

// Largest difference over the root mean square of `expected`.
double relative_error(std::span<const float> got, std::span<const float> expected) {
  double largest = 0.0, squares = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, difference(got[i], expected[i]));
    squares += static_cast<double>(expected[i]) * expected[i];
  }
  return largest == 0.0 ? 0.0 : largest / std::sqrt(squares / static_cast<double>(expected.size()));
}

double length(std::span<const float> a) {
  double squares = 0.0;
  for (const float value : a) squares += static_cast<double>(value) * value;
  return std::sqrt(squares);
}

double distance(std::span<const float> a, std::span<const float> b) {
  double squares = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) squares += difference(a[i], b[i]) * difference(a[i], b[i]);
  return std::sqrt(squares);
}

// A product in which nothing remains nothing, whatever the other factor is.
double error_product(double error, double factor) { return error == 0.0 ? 0.0 : error * factor; }

void clear(const DeviceMemory* memory, void* to, std::size_t bytes) {
  if (memory == nullptr) {
    std::memset(to, 0, bytes);
  } else {
    memory->fill(to, 0, bytes);
  }
}

void copy_in(const DeviceMemory* memory, void* to, const std::vector<float>& from) {
  const std::size_t bytes = from.size() * sizeof(float);
  if (memory == nullptr) {
    std::memcpy(to, from.data(), bytes);
  } else {
    memory->copy_in(to, from.data(), bytes);
  }
}

std::vector<float> copy_out(const DeviceMemory* memory, const Tensor& tensor, std::int64_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  const std::size_t bytes = out.size() * sizeof(float);
  if (memory == nullptr) {
    std::memcpy(out.data(), tensor.data, bytes);
  } else {
    memory->copy_out(out.data(), tensor.data, bytes);
    check(*memory);
  }
  return out;
}

// What the operators of one layer give in one of their forms, on the host.
struct LayerResult {
  std::vector<float> q;                ///< [rows, Hq * D], not rotated
  std::vector<std::vector<float>> kv;  ///< of each row, [2, Hkv, cell]: one key and one value in a cell
  std::vector<float> residual, down;   ///< [rows, hidden]
};

class Measurement {
 public:
  Measurement(const ModelConfig& config, const ModelWeights& weights, const ops::KernelTable& table, ThreadPool& pool)
      : config_(config),
        weights_(weights),
        table_(table),
        small_(ops::with_fused(table, {})),
        rows_(table.max_fused_rows == 0 ? kRows : std::min(kRows, table.max_fused_rows)),
        workspace_(CachingPool::create(table.memory)),
        fused_{&table_, &pool, &workspace_},
        composed_{&small_, &pool, &workspace_},
        kv_({quant::KvFormat::f32, 1, config.num_kv_heads, config.head_dim}, rows_, table.memory),
        rotations_(make_rope_table(config.rope, config.head_dim, rows_)) {
    if (table.memory != nullptr) rotations_ = copy_to(*table.memory, rotations_.data(), rotations_.bytes());
    std::mt19937 random(kSeed);
    for (int i = 0; i < rows_; ++i) {
      tokens_.push_back(static_cast<TokenId>(random() % static_cast<unsigned>(config.vocab_size)));
      positions_.push_back(i);
      slots_.push_back(i * kBlockTokens);  // a block for each row: what a cell holds then is that row's
      row_ids_.push_back(i);
    }
  }

  std::vector<FusionError> run() {
    const int worst = worst_layer();
    measure_layer(0);
    if (worst != 0) measure_layer(worst);
    measure_head();
    return std::move(errors_);
  }

 private:
  Tensor rows_of_zeros(int cols) {
    const auto count = static_cast<std::size_t>(rows_) * static_cast<std::size_t>(cols);
    Tensor rows(workspace_.allocate_array<float>(count), DType::f32, {rows_, cols});
    clear(table_.memory, rows.data, count * sizeof(float));
    return rows;
  }

  std::vector<float> to_host(const Tensor& rows) const {
    return copy_out(table_.memory, rows, rows.dim(0) * rows.dim(1));
  }

  double largest(const Tensor& vector, double otherwise) const {
    if (!vector) return otherwise;
    double found = 0.0;
    for (const float value : copy_out(table_.memory, vector, vector.dim(0)))
      found = std::max(found, std::fabs(double{value}));
    return found;
  }

  // A product of what multiplies queries and keys, and of what may make them large without it.
  int worst_layer() const {
    int worst = 0;
    double most = -1.0;
    for (int i = 0; i < config_.num_layers; ++i) {
      const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(i)];  // its vectors are always there
      const double found = largest(layer.q_norm, 1.0) * largest(layer.k_norm, 1.0) +
                           largest(layer.q_bias, 0.0) * largest(layer.k_bias, 0.0);
      if (found > most) worst = i, most = found;
    }
    return worst;
  }

  Tensor embeddings() {
    Tensor hidden = rows_of_zeros(config_.hidden_size);
    ops::embed(hidden, weights_.embedding, tokens_, composed_);
    return hidden;
  }

  // Every operator starts from what the small ones give, so that each answers for itself.
  LayerResult run_layer(const LayerWeights& layer, Tensor hidden, Tensor attended, ops::ExecContext& ctx) {
    LayerResult result;
    const float eps = config_.rms_norm_eps;
    Tensor q = rows_of_zeros(config_.q_size());
    for (BlockId block = 0; block < rows_; ++block) kv_.zero(block);
    ops::norm_qkv(q, kv_.layer(0), hidden, {layer.attention_norm, eps}, layer.qkv,
                  {layer.q_bias, layer.k_bias, layer.v_bias, layer.q_norm, layer.k_norm}, positions_, slots_,
                  {rotations_.as<const float>(), config_.head_dim, rows_}, ctx);
    result.q = to_host(q);
    for (BlockId block = 0; block < rows_; ++block) {
      result.kv.emplace_back(static_cast<std::size_t>(kv_.shape().block_bytes()) / sizeof(float));
      kv_.read(block, std::as_writable_bytes(std::span(result.kv.back())));
    }
    Tensor residual = rows_of_zeros(config_.hidden_size);
    ops::linear_residual(residual, attended ? attended : q, layer.attention_out, Tensor(), ctx);
    result.residual = to_host(residual);
    Tensor down = rows_of_zeros(config_.hidden_size);
    ops::linear_residual(down,
                         ops::norm_gate_up(hidden, {layer.ffn_norm, eps}, layer.gate_up, layer.down.act_type, ctx),
                         layer.down, ctx);
    result.down = to_host(down);
    return result;
  }

  void measure_layer(int index) {
    workspace_.reset();
    const LayerUse layer(weights_, index);
    const Tensor hidden = embeddings();
    const LayerResult expected = run_layer(*layer, hidden, Tensor(), composed_);
    Tensor attended = rows_of_zeros(config_.q_size());  // queries in the place of what attention would give
    copy_in(table_.memory, attended.data, expected.q);
    const LayerResult got = run_layer(*layer, hidden, attended, fused_);
    add(ops::FusedOp::norm_qkv, "scores", score_error(got, expected), kScoreBound, index);
    add(ops::FusedOp::norm_qkv, "values", value_error(got, expected), kRelativeBound, index);
    add(ops::FusedOp::linear_residual, "residual", relative_error(got.residual, expected.residual), kRelativeBound,
        index);
    add(ops::FusedOp::norm_gate_up, "down", relative_error(got.down, expected.down), kRelativeBound, index);
  }

  void measure_head() {
    workspace_.reset();
    const Tensor hidden = embeddings();
    const auto logits = [&](ops::ExecContext& ctx) {
      Tensor out = rows_of_zeros(config_.vocab_size);
      std::vector<TokenId> best(row_ids_.size());
      ops::head(out, best, hidden, row_ids_, {weights_.final_norm, config_.rms_norm_eps}, weights_.head_weight(), ctx);
      return to_host(out);
    };
    const std::vector<float> expected = logits(composed_);
    add(ops::FusedOp::head, "logits", relative_error(logits(fused_), expected), kRelativeBound, -1);
  }

  std::span<const float> cell(const LayerResult& result, int row, int which, int head) const {
    const std::size_t size = result.kv.front().size() / static_cast<std::size_t>(2 * config_.num_kv_heads);
    const auto index = static_cast<std::size_t>(which * config_.num_kv_heads + head);
    return std::span(result.kv[static_cast<std::size_t>(row)]).subspan(index * size, size);
  }

  double score_error(const LayerResult& got, const LayerResult& expected) const {
    const auto dim = static_cast<std::size_t>(config_.head_dim);
    const int group = config_.num_heads / config_.num_kv_heads;
    double worst = 0.0;
    for (int row = 0; row < rows_; ++row) {
      for (int head = 0; head < config_.num_heads; ++head) {
        const auto begin = static_cast<std::size_t>(row * config_.num_heads + head) * dim;
        const auto q = std::span(expected.q).subspan(begin, dim);
        const double q_error = distance(std::span(got.q).subspan(begin, dim), q);
        for (int key = 0; key < rows_; ++key) {
          const auto k = cell(expected, key, 0, head / group);
          const double k_error = distance(cell(got, key, 0, head / group), k);
          worst = std::max(worst, error_product(q_error, length(k)) + error_product(k_error, length(q)));
        }
      }
    }
    return worst / std::sqrt(static_cast<double>(config_.head_dim));
  }

  // Of 16 places in a cell one is filled, and zeros differ by nothing.
  double value_error(const LayerResult& got, const LayerResult& expected) const {
    std::vector<float> a, b;
    for (int row = 0; row < rows_; ++row) {
      for (int head = 0; head < config_.num_kv_heads; ++head) {
        const auto got_cell = cell(got, row, 1, head), expected_cell = cell(expected, row, 1, head);
        a.insert(a.end(), got_cell.begin(), got_cell.end());
        b.insert(b.end(), expected_cell.begin(), expected_cell.end());
      }
    }
    return relative_error(a, b) / std::sqrt(static_cast<double>(kBlockTokens));
  }

  // Keeps the larger of two errors of one kind.
  void add(ops::FusedOp op, const char* quantity, double error, double bound, int layer) {
    if (!ops::has_kernel(table_, op)) return;
    const auto found = std::find_if(errors_.begin(), errors_.end(),
                                    [&](const FusionError& one) { return std::strcmp(one.quantity, quantity) == 0; });
    if (found == errors_.end()) {
      errors_.push_back({op, quantity, error, bound, layer});
    } else if (!(error <= found->error)) {
      *found = {op, quantity, error, bound, layer};
    }
  }

  const ModelConfig& config_;
  const ModelWeights& weights_;
  const ops::KernelTable& table_;
  const ops::KernelTable small_;
  const int rows_;
  Workspace workspace_;
  ops::ExecContext fused_, composed_;
  kv::KvStorage kv_;
  Buffer rotations_;
  std::vector<TokenId> tokens_;
  std::vector<std::int32_t> positions_, slots_, row_ids_;
  std::vector<FusionError> errors_;
};

}  // namespace

const char* to_string(Fusion fusion) {
  switch (fusion) {
    case Fusion::automatic:
      return "auto";
    case Fusion::on:
      return "on";
    case Fusion::off:
      return "off";
  }
  return "?";
}

Fusion parse_fusion(const std::string& name) {
  for (const Fusion fusion : {Fusion::automatic, Fusion::on, Fusion::off}) {
    if (name == to_string(fusion)) return fusion;
  }
  fail(ErrorCode::invalid_argument, "fusion must be one of auto, on, off, got '", name, "'");
}

std::vector<FusionError> measure_fusion(const ModelConfig& config, const ModelWeights& weights,
                                        const ops::KernelTable& table, ThreadPool& pool) {
  return Measurement(config, weights, table, pool).run();
}

FusionPlan plan_fusion(const FusionOptions& options, const ModelConfig& config, const ModelWeights& weights,
                       const ops::KernelTable& table, ThreadPool& pool) {
  FusionPlan plan;
  plan.asked = options.fusion;
  bool any = false;
  for (const ops::FusedOp op : ops::kFusedOps) {
    plan.has_kernel[op] = ops::has_kernel(table, op);
    plan.fused[op] = plan.has_kernel[op] && options.fusion != Fusion::off;
    any = any || plan.has_kernel[op];
  }
  const bool automatic = options.fusion == Fusion::automatic;
  if (!any || !(options.measure || (automatic && !table.fused_exact))) return plan;
  const auto begin = std::chrono::steady_clock::now();
  plan.errors = measure_fusion(config, weights, table, pool);
  plan.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  for (const FusionError& error : plan.errors) {
    if (automatic && !error.is_within()) plan.fused[error.op] = false;
  }
  return plan;
}

std::string describe(const FusionPlan& plan) {
  std::ostringstream out;
  for (const ops::FusedOp op : ops::kFusedOps) {
    out << (op == ops::kFusedOps.front() ? "" : ", ") << ops::to_string(op)
        << (plan.fused[op] ? " fused" : " composed");
    const char* separator = " (";
    for (const FusionError& error : plan.errors) {
      if (error.op != op) continue;
      out << separator << error.quantity << " off by " << error.error << ", bound " << error.bound;
      separator = "; ";
    }
    if (*separator == ';') out << ')';
  }
  return out.str();
}

}  // namespace nb::model
