// What single optimisations of operators gain: each against the same work without it, in turn, one JSON line a case.
//
//   ablation_bench [--backend NAME] [--threads N] [--rounds N] [--rows norm_qkv,head,...]
//
// The fused operators (norm_qkv, norm_gate_up, linear_residual, head) against the composition of the small ones that
// runs where a table has no fused kernel, over the same weights. The row "attention" is the engine's (tiles, online
// softmax, bf16 keys and values in blocks) against eager attention: the scores of all queries and keys of all heads,
// then the softmax of every row, then the product with the values, each a pass through the whole matrix in memory.
// Eager is made of good parts: both products are the backend's own matrix product with bf16 operands, over keys and
// values that were packed before the clock starts; the softmax is a loop over vectors of f32, on all threads, which
// spares itself the keys that a row does not see. The two must agree, or the program fails. On a device there is no
// eager side (it would need kernels of its own), and `off` is empty.
//
// Shapes are those of SmolLM2-135M, weights q8_0 (bf16 on a device), random. Times in microseconds.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/ids.h"
#include "bench_machine.h"
#include "eager_softmax.h"
#include "kv/kv_storage.h"
#include "ops/fusion.h"
#include "quant/kv_format.h"

namespace {

using nb::DType;
using nb::Tensor;
using nb::ops::FusedOp;
using nb::quant::Format;

constexpr int kWidth = 576, kInner = 1536, kHeads = 9, kKvHeads = 3, kDim = 64, kVocab = 49152, kContext = 2048;
constexpr float kScale = 0.125f;

struct Options {
  std::string backend;
  int threads = nb::ThreadPool::default_num_threads();
  int rounds = 15;
  std::vector<std::string> rows;
};

using Work = std::function<void()>;

double seconds_of(const Machine& machine, const Work& work, int count) {
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) work();
  machine.finish();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / count;
}

void print_samples(const char* name, const std::vector<double>& samples) {
  std::printf("\"%s\": [", name);
  for (std::size_t i = 0; i < samples.size(); ++i) std::printf("%s%.3f", i > 0 ? ", " : "", samples[i]);
  std::printf("]");
}

// Runs both sides in turn, every second round in the opposite order, and prints the microseconds of a call.
void compare(const Machine& machine, const std::string& row, const std::string& what, int rounds, const Work& off,
             const Work& on) {
  std::vector<double> off_us, on_us;
  const auto count_for = [&](const Work& work) {  // calls of a sample: long enough to be measured
    if (!work) return 1;
    work();
    int count = 1;
    while (seconds_of(machine, work, count) * count < 2e-3 && count < (1 << 16)) count *= 2;
    return count;
  };
  const int count_off = count_for(off), count_on = count_for(on);
  const auto add = [&](const Work& work, int count, std::vector<double>& samples) {
    if (work) samples.push_back(seconds_of(machine, work, count) * 1e6);
  };
  for (int i = 0; i < rounds; ++i) {
    if (i % 2 == 0) add(off, count_off, off_us);
    add(on, count_on, on_us);
    if (i % 2 != 0) add(off, count_off, off_us);
  }
  std::printf("{\"row\": \"%s\", \"case\": \"%s\", \"backend\": \"%s\", \"threads\": %d, ", row.c_str(), what.c_str(),
              machine.backend.kernels->name, machine.pool.num_threads());
  print_samples("off", off_us);
  std::printf(", ");
  print_samples("on", on_us);
  std::printf("}\n");
  std::fflush(stdout);
}

void print_skipped(const Machine& machine, const std::string& row, const std::string& what, const char* why) {
  std::printf("{\"row\": \"%s\", \"case\": \"%s\", \"backend\": \"%s\", \"skipped\": \"%s\"}\n", row.c_str(),
              what.c_str(), machine.backend.kernels->name, why);
}

// ---- fused operators ----

// One of them over `num_rows` rows, in both forms.
class Fused {
 public:
  Fused(Machine& machine, FusedOp op, int num_rows)
      : machine_(machine),
        op_(op),
        num_rows_(num_rows),
        composed_table_(nb::ops::with_fused(*machine.ctx.kernels, all_but(op))),
        x_(machine.place(random_values(size(kWidth)))),
        scale_(machine.place(std::vector<float>(kWidth, 1.0f))),
        out_(machine.place(std::vector<float>(size(kWidth)))),
        rotations_(machine.place(random_values(size(kDim)))),
        storage_({nb::quant::KvFormat::bf16, 1, kKvHeads, kDim}, num_rows / nb::kBlockTokens + 1, machine.memory),
        weights_(machine, machine.memory == nullptr ? Format::q8_0 : Format::bf16, matrices(op), kWidth,
                 op == FusedOp::norm_gate_up ? nb::ops::Grouping::interleaved32 : nb::ops::Grouping::stacked,
                 num_rows <= 8),
        ids_(static_cast<std::size_t>(num_rows)),
        best_(ids_.size()) {
    std::iota(ids_.begin(), ids_.end(), 0);
  }

  /// Whether the fused form is one kernel for so many rows, and the other is not.
  bool is_comparison() {
    nb::ops::FusionCounts counts;
    run(*machine_.ctx.kernels, &counts);
    const bool fuses = counts.fused[op_] == 1;
    run(composed_table_, &counts);
    if (fuses && (counts.fused[op_] != 1 || counts.composed[op_] != 1)) {
      throw std::logic_error("the operator without its fused kernel was not composed");
    }
    return fuses;
  }

  void fused() { run(*machine_.ctx.kernels, nullptr); }
  void composed() { run(composed_table_, nullptr); }

 private:
  std::size_t size(int cols) const { return static_cast<std::size_t>(num_rows_) * static_cast<std::size_t>(cols); }

  static nb::ops::PerFusedOp<bool> all_but(FusedOp op) {
    nb::ops::PerFusedOp<bool> kept;
    for (const FusedOp each : nb::ops::kFusedOps) kept[each] = each != op;
    return kept;
  }

  static std::vector<int> matrices(FusedOp op) {
    switch (op) {
      case FusedOp::norm_qkv:
        return {kWidth, kKvHeads * kDim, kKvHeads * kDim};
      case FusedOp::norm_gate_up:
        return {kInner, kInner};
      case FusedOp::linear_residual:
        return {kWidth};
      case FusedOp::head:
        return {kVocab};
    }
    throw std::logic_error("no such operator");
  }

  void run(const nb::ops::KernelTable& table, nb::ops::FusionCounts* counts) {
    nb::ops::ExecContext ctx = machine_.ctx;
    ctx.kernels = &table;
    ctx.counts = counts;
    const Tensor x(x_.data(), DType::f32, {num_rows_, kWidth}), out(out_.data(), DType::f32, {num_rows_, kWidth});
    const nb::ops::Norm norm{Tensor(scale_.data(), DType::f32, {kWidth}), 1e-6f};
    const nb::ops::LinearWeight& weight = weights_.next();
    switch (op_) {
      case FusedOp::norm_qkv:
        nb::ops::norm_qkv(out, storage_.layer(0), x, norm, weight, {}, ids_, ids_,
                          {rotations_.as<const float>(), kDim, num_rows_}, ctx);
        break;
      case FusedOp::norm_gate_up:
        nb::ops::norm_gate_up(x, norm, weight, weight.act_type, ctx);
        break;
      case FusedOp::linear_residual:
        nb::ops::linear_residual(out, x, weight, Tensor(), ctx);
        break;
      case FusedOp::head:
        nb::ops::head(Tensor(), best_, x, ids_, norm, weight, ctx);
        break;
    }
    machine_.workspace.reset();
  }

  Machine& machine_;
  FusedOp op_;
  int num_rows_;
  nb::ops::KernelTable composed_table_;
  nb::Buffer x_, scale_, out_, rotations_;
  nb::kv::KvStorage storage_;
  Copies weights_;
  std::vector<std::int32_t> ids_, best_;
};

void compare_fused(Machine& machine, FusedOp op, int rounds) {
  // Rows of a decode step, of one with 8 requests, and of a slice of a prompt, whose head has one row.
  for (const int num_rows : op == FusedOp::head ? std::vector{1, 8} : std::vector{1, 8, 512}) {
    const std::string what = std::to_string(num_rows) + (num_rows == 1 ? " row" : " rows");
    Fused both(machine, op, num_rows);
    if (both.is_comparison()) {
      compare(
          machine, nb::ops::to_string(op), what, rounds, [&] { both.composed(); }, [&] { both.fused(); });
    } else {
      print_skipped(machine, nb::ops::to_string(op), what, "this backend has no fused kernel for so many rows");
    }
  }
}

// ---- attention ----

// A prompt of kContext tokens that attends to itself.
class Attention {
 public:
  explicit Attention(Machine& machine)
      : machine_(machine),
        storage_({nb::quant::KvFormat::bf16, 1, kKvHeads, kDim}, kContext / nb::kBlockTokens, machine.memory),
        rotations_(machine.place(no_rotation())),
        q_(machine.place(random_values(std::size_t{kContext} * kHeads * kDim))),
        out_(machine.place(std::vector<float>(std::size_t{kContext} * kHeads * kDim))),
        positions_(kContext),
        blocks_(kContext / nb::kBlockTokens) {
    std::iota(positions_.begin(), positions_.end(), 0);
    std::iota(blocks_.begin(), blocks_.end(), 0);
    const std::vector<float> keys = random_values(std::size_t{kContext} * kKvHeads * kDim);
    std::vector<float> values = keys;
    std::rotate(values.begin(), values.begin() + 1000, values.end());
    const nb::Buffer k = machine.place(keys), v = machine.place(values);
    nb::ops::kv_write(storage_.layer(0), Tensor(k.data(), DType::f32, {kContext, kKvHeads * kDim}),
                      Tensor(v.data(), DType::f32, {kContext, kKvHeads * kDim}), positions_, machine.ctx);
    machine.workspace.reset();
    machine.finish();
    if (machine.memory != nullptr) return;
    scores_.resize(std::size_t{kHeads} * kContext * kContext);
    for (int h = 0; h < kKvHeads; ++h) {
      key_weights_.push_back(pack(kContext, kDim, [&](int row, int col) { return keys[at(row, h, col)]; }));
      value_weights_.push_back(pack(kDim, kContext, [&](int row, int col) { return values[at(col, h, row)]; }));
    }
    check_agreement();
  }

  /// The engine's.
  void tiled() {
    nb::ops::attention(rows_of_heads(out_), rows_of_heads(q_), kHeads, kScale, 0,
                       {rotations_.as<const float>(), kDim, kContext}, storage_.layer(0),
                       {positions_, segments_, runs_, blocks_}, machine_.ctx);
    machine_.workspace.reset();
  }

  void eager() {
    for (int h = 0; h < kHeads; ++h) {
      product(matrix_of(h), head_of(q_, h), key_weights_[static_cast<std::size_t>(h / (kHeads / kKvHeads))]);
    }
    const Work softmax = [this] {
      machine_.pool.run([this](const nb::Part& part) {
        for (int row = part.index; row < kHeads * kContext; row += part.count) {
          eager_softmax(scores_.data() + std::size_t{kContext} * static_cast<std::size_t>(row), row % kContext + 1,
                        kContext, kScale);
        }
      });
    };
    softmax();
    for (int h = 0; h < kHeads; ++h) {
      product(head_of(out_, h), matrix_of(h), value_weights_[static_cast<std::size_t>(h / (kHeads / kKvHeads))]);
    }
  }

 private:
  // Cosines of 1 and sines of 0.
  static std::vector<float> no_rotation() {
    std::vector<float> table(std::size_t{kContext} * kDim);
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = i % kDim < kDim / 2 ? 1.0f : 0.0f;
    return table;
  }

  static std::size_t at(int token, int head, int i) {
    return static_cast<std::size_t>((token * kKvHeads + head) * kDim + i);
  }

  static Tensor rows_of_heads(const nb::Buffer& buffer) {
    return Tensor(buffer.data(), DType::f32, {kContext, kHeads * kDim});
  }

  // The columns of one head.
  static Tensor head_of(const nb::Buffer& buffer, int head) {
    Tensor tensor(buffer.as<float>() + head * kDim, DType::f32, {kContext, kDim});
    tensor.row_stride = kHeads * kDim;
    return tensor;
  }

  Tensor matrix_of(int head) {
    return Tensor(scores_.data() + std::size_t{kContext} * kContext * static_cast<std::size_t>(head), DType::f32,
                  {kContext, kContext});
  }

  template <class Function>
  nb::ops::LinearWeight pack(int rows, int cols, const Function& value) {
    const auto read = [&, cols](std::int32_t begin, std::int32_t count, std::byte* out) {
      std::vector<float> row(static_cast<std::size_t>(cols));
      const std::int64_t bytes = nb::quant::row_bytes(Format::bf16, cols);
      for (int i = 0; i < count; ++i) {
        for (int c = 0; c < cols; ++c) row[static_cast<std::size_t>(c)] = value(begin + i, c);
        nb::quant::pack_row(Format::bf16, row.data(), cols, reinterpret_cast<std::uint8_t*>(out + i * bytes));
      }
    };
    const std::vector<nb::ops::MatrixSource> sources = {{"eager", Format::bf16, rows, cols, read, {}}};
    return nb::ops::pack_linear(sources, nb::ops::Grouping::stacked, "auto", machine_.backend.kernels->layout,
                                *machine_.arena, machine_.pool);
  }

  void product(Tensor out, Tensor x, const nb::ops::LinearWeight& weight) {
    const nb::ops::Activation rows = nb::ops::prepare(x, weight.act_type, machine_.ctx);
    nb::ops::linear(out, rows, weight.segments.front(), Tensor(), false, machine_.ctx);
    machine_.workspace.reset();
  }

  // Both are right up to what bf16 rounds, or one of them does other work than it says.
  void check_agreement() {
    const auto copy = [&] {
      const auto* const data = out_.as<const float>();
      return std::vector<float>(data, data + std::size_t{kContext} * kHeads * kDim);
    };
    tiled();
    const std::vector<float> ours = copy();
    eager();
    const std::vector<float> theirs = copy();
    double worst = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) worst = std::max(worst, double{std::abs(ours[i] - theirs[i])});
    if (!(worst < 0.05)) throw std::runtime_error("eager and tiled attention differ by " + std::to_string(worst));
  }

  Machine& machine_;
  nb::kv::KvStorage storage_;
  nb::Buffer rotations_, q_, out_;
  std::vector<std::int32_t> positions_, blocks_;
  std::vector<nb::ops::AttentionSegment> segments_{{0, kContext, 0, 1}};
  std::vector<nb::ops::AttentionRun> runs_{{0, kContext, 0}};
  std::vector<float> scores_;  // of all heads
  std::vector<nb::ops::LinearWeight> key_weights_, value_weights_;
};

void compare_attention(Machine& machine, int rounds) {
  Attention both(machine);
  const Work eager = machine.memory == nullptr ? Work([&] { both.eager(); }) : Work();
  compare(machine, "attention", "2048 rows, 2048 keys", rounds, eager, [&] { both.tiled(); });
}

// ---- options ----

const std::vector<std::string>& row_names() {
  static const std::vector<std::string> names = {"norm_qkv", "norm_gate_up", "linear_residual", "head", "attention"};
  return names;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    words.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(name + " wants a value");
    if (name == "--backend") {
      options.backend = argv[i + 1];
    } else if (name == "--threads") {
      options.threads = std::stoi(argv[i + 1]);
    } else if (name == "--rounds") {
      options.rounds = std::stoi(argv[i + 1]);
      if (options.rounds < 1) throw std::invalid_argument("--rounds must be at least 1");
    } else if (name == "--rows") {
      options.rows = split(argv[i + 1]);
    } else {
      throw std::invalid_argument("no option " + name + "; there are --backend, --threads, --rounds and --rows");
    }
  }
  for (const std::string& row : options.rows) {
    if (std::find(row_names().begin(), row_names().end(), row) == row_names().end()) {
      std::string message = "no row '" + row + "'; there are";
      for (const std::string& name : row_names()) message += " " + name;
      throw std::invalid_argument(message);
    }
  }
  if (options.rows.empty()) options.rows = row_names();
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    Machine machine(options.backend, options.threads);
    const auto wanted = [&](const std::string& name) {
      return std::find(options.rows.begin(), options.rows.end(), name) != options.rows.end();
    };
    for (const FusedOp op : nb::ops::kFusedOps) {
      if (wanted(nb::ops::to_string(op))) compare_fused(machine, op, options.rounds);
    }
    if (wanted("attention")) compare_attention(machine, options.rounds);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ablation_bench: error: %s\n", error.what());
    return 2;
  }
  return 0;
}
