// calibration.cpp against the naive model, whose matrices tell what they are given.
#include "model/calibration.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "base/code_of.h"
#include "model/naive_llama.h"

namespace nb::model {
namespace {

constexpr int kSequence = 83;

std::vector<TokenId> random_ids(int count, int vocab) {
  std::mt19937 random(5);
  std::vector<TokenId> ids;
  for (int i = 0; i < count; ++i) ids.push_back(static_cast<TokenId>(random() % static_cast<unsigned>(vocab)));
  return ids;
}

struct Sums {
  std::vector<double> squares;
  int count = 0;
};

void expect_means(const std::vector<float>& actual, const Sums& sums, const std::string& what) {
  ASSERT_EQ(actual.size(), sums.squares.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double expected = sums.squares[i] / sums.count;
    EXPECT_NEAR(static_cast<double>(actual[i]), expected, 1e-4 * expected + 1e-9) << what << " column " << i;
  }
}

class CalibrationOnBackend : public testing::TestWithParam<std::string> {};

TEST_P(CalibrationOnBackend, MeasuresWhatTheNaiveModelSees) {
  for (const bool is_qwen : {false, true}) {
    NaiveLlama naive;
    if (is_qwen) naive.architecture = "qwen3", naive.qk_norm = true, naive.tied = false;
    naive.fill();
    const io::test::ScratchDir scratch;
    const auto source = io::open_model(scratch.write("tiny.gguf", naive.gguf()));
    const std::vector<TokenId> ids = random_ids(2 * kSequence + 11, naive.vocab);

    std::map<std::string, Sums> seen;
    naive.watch = [&](const std::string& name, const std::vector<double>& input) {
      Sums& sums = seen[name];
      sums.squares.resize(input.size(), 0.0);
      for (std::size_t i = 0; i < input.size(); ++i) sums.squares[i] += input[i] * input[i];
      ++sums.count;
    };
    for (std::size_t begin = 0; begin < ids.size(); begin += kSequence) {
      const std::size_t end = std::min(ids.size(), begin + kSequence);
      static_cast<void>(naive.forward(
          {ids.begin() + static_cast<std::ptrdiff_t>(begin), ids.begin() + static_cast<std::ptrdiff_t>(end)}));
    }

    ThreadPool pool(2);
    std::vector<std::uint64_t> told;
    const InputStatistics statistics =
        measure_inputs(*source, ids, kSequence, ops::find_backend(GetParam()), pool,
                       [&](std::uint64_t done, std::uint64_t all) { told.push_back(done * 10 + all); });
    EXPECT_EQ(told, (std::vector<std::uint64_t>{12, 22}));
    ASSERT_EQ(statistics.layers.size(), 2u);
    for (int i = 0; i < 2; ++i) {
      const LayerStatistics& layer = statistics.layers[static_cast<std::size_t>(i)];
      const std::string prefix = "blk." + std::to_string(i) + ".";
      expect_means(layer.qkv, seen.at(prefix + "attn_q.weight"), prefix + "qkv");
      expect_means(layer.attention_out, seen.at(prefix + "attn_output.weight"), prefix + "attention_out");
      expect_means(layer.gate_up, seen.at(prefix + "ffn_up.weight"), prefix + "gate_up");
      expect_means(layer.down, seen.at(prefix + "ffn_down.weight"), prefix + "down");
    }
    expect_means(statistics.head, seen.at(naive.tied ? "token_embd.weight" : "output.weight"), "head");
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, CalibrationOnBackend, testing::ValuesIn(ops::available_backends()),
                         [](const auto& test) { return test.param; });

TEST(Calibration, RefusesWhatItCannotRun) {
  NaiveLlama naive;
  naive.fill();
  const io::test::ScratchDir scratch;
  const auto source = io::open_model(scratch.write("tiny.gguf", naive.gguf()));
  ThreadPool pool(1);
  const auto measure = [&](const std::vector<TokenId>& ids, int length) {
    return code_of([&] { measure_inputs(*source, ids, length, ops::find_backend("reference"), pool); });
  };
  EXPECT_EQ(measure({}, 8), ErrorCode::invalid_argument);
  EXPECT_EQ(measure({1}, 0), ErrorCode::invalid_argument);
  EXPECT_EQ(measure({1}, naive.context + 1), ErrorCode::invalid_argument);
  EXPECT_EQ(measure({naive.vocab}, 8), ErrorCode::invalid_argument);
  EXPECT_EQ(measure({-1}, 8), ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace nb::model
