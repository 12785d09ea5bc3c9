// kv_selftest.cpp against divergences computed from whole prompts, and with a backend that stores wrong scales.
#include "engine/kv_selftest.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "engine/engine_fixture.h"
#include "ops/cpu/reference/reference.h"

namespace nb::engine {
namespace {

using quant::KvFormat;

std::vector<TokenId> random_text(int count = kSelftestTokens) { return random_request(3, count, 1).prompt; }

/// f64[positions] KL(p || q) from the logits of all positions, in the obvious way.
std::vector<double> naive_divergences(const Buffer& p, const Buffer& q, int num_tokens, int vocab_size) {
  const auto probabilities = [&](const Buffer& logits, int row) {
    std::vector<double> out;
    double sum = 0.0;
    for (int i = 0; i < vocab_size; ++i) {
      out.push_back(std::exp(static_cast<double>(logits.as<float>()[row * vocab_size + i])));
      sum += out.back();
    }
    for (double& value : out) value /= sum;
    return out;
  };
  std::vector<double> out;
  for (int row = 0; row < num_tokens; ++row) {
    const std::vector<double> a = probabilities(p, row), b = probabilities(q, row);
    double kl = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) kl += a[i] * std::log(a[i] / b[i]);
    out.push_back(kl);
  }
  return out;
}

Buffer logits_of(const model::Model& model, KvFormat format, const std::vector<TokenId>& tokens) {
  Engine engine(model, {.kv_format = format, .max_num_seqs = 1});
  Request request;
  request.prompt = tokens;
  request.max_tokens = 0;
  request.prompt_logits = true;
  return answer_one(engine, request).prompt_logits;
}

/// The reference, whose tokens get the scales of their keys and values from the token before them in the block.
const ops::Backend& wrong_scales() {
  static const ops::KernelTable table = [] {
    ops::KernelTable copy = ops::reference_kernels();
    copy.name = "wrong_scales";
    copy.kv_write = [](const ops::KvWriteArgs& a, const Part& part) {
      ops::reference_kernels().kv_write(a, part);
      if (a.kv.format != KvFormat::int8) return;
      const std::int64_t token_bytes = a.kv.head_dim + 2;
      for (int row = 0; row < a.rows; ++row) {
        const int token = a.slots[row] % kBlockTokens;
        if (token == 0) continue;
        std::uint8_t* const block = a.kv.base + a.slots[row] / kBlockTokens * a.kv.block_stride;
        for (int head = 0; head < 2 * a.kv.num_kv_heads; ++head) {  // of keys, then of values
          std::uint8_t* const scale = block + head * a.kv.key_cell_bytes + token * token_bytes + a.kv.head_dim;
          std::memcpy(scale, scale - token_bytes, 2);
        }
      }
    };
    return copy;
  }();
  static const ops::Backend backend{
      .name = table.name, .kernels = &table, .deterministic = &table, .device = {}, .hardware = "", .why_not = ""};
  return backend;
}

TEST(KvSelftest, MeasuresWhatWholePromptsSay) {
  for (const KvFormat format : {KvFormat::int8, KvFormat::mixed}) {
    const auto model = model::make_tiny_model({.num_threads = 2});
    const std::vector<TokenId> text = random_text();
    const Buffer exact = logits_of(*model, KvFormat::f32, text), other = logits_of(*model, format, text);
    const std::vector<double> all = naive_divergences(exact, other, kSelftestTokens, model->config().vocab_size);
    double sum = 0.0, worst = 0.0;
    for (int i = kSelftestFirst; i < kSelftestTokens; ++i) {
      sum += all[static_cast<std::size_t>(i)];
      worst = std::max(worst, all[static_cast<std::size_t>(i)]);
    }
    const KvSelftest found = measure_kv_format(*model, text, format);
    EXPECT_EQ(found.format, format);
    EXPECT_EQ(found.num_tokens, kSelftestTokens);
    EXPECT_EQ(found.num_positions, kSelftestTokens - kSelftestFirst);
    EXPECT_GT(sum, 0.0);
    EXPECT_NEAR(found.mean_kl, sum / found.num_positions, 1e-6 + 1e-3 * found.mean_kl);
    EXPECT_NEAR(found.worst_kl, worst, 1e-6 + 1e-3 * worst);
    EXPECT_GT(found.agreement, 0.6);
    EXPECT_GT(found.seconds, 0.0);
  }
}

TEST(KvSelftest, TheExactFormatDiffersByNothing) {
  const auto model = model::make_tiny_model();
  const KvSelftest found = measure_kv_format(*model, random_text(), KvFormat::f32);
  EXPECT_LT(found.mean_kl, 1e-9);
  EXPECT_EQ(found.agreement, 1.0);
}

TEST(KvSelftest, ScalesOfAnotherTokenAreRefused) {
  const auto sound = model::make_tiny_model();
  const KvSelftest good = measure_kv_format(*sound, random_text(), KvFormat::int8);
  EXPECT_TRUE(is_within_limit(KvFormat::int8, good.cost())) << good.cost();
  const auto broken = model::make_tiny_model({.device = &wrong_scales()});
  const KvSelftest bad = measure_kv_format(*broken, random_text(), KvFormat::int8);
  EXPECT_FALSE(is_within_limit(KvFormat::int8, bad.cost())) << bad.cost();
}

TEST(KvSelftest, EveryBackendFindsAboutTheSame) {
  for (const std::string& backend : engine_backends()) {
    if ((ops::find_backend(backend).kernels->kv_formats & ops::kv_bit(KvFormat::int8)) == 0) continue;
    const auto model = model::make_tiny_model({.backend = backend, .dtype = "f32"});
    const KvSelftest found = measure_kv_format(*model, random_text(), KvFormat::int8);
    EXPECT_TRUE(is_within_limit(KvFormat::int8, found.cost())) << backend << ": " << found.cost();
    EXPECT_EQ(found.floor_kl, 0.0) << backend;
    EXPECT_GT(found.mean_kl, 1e-7) << backend;
  }
}

// Activations of 8 bits turn the smallest difference into a rounding: that is none of the format's.
TEST(KvSelftest, WhatBf16CostsTooIsNotHeldAgainstAFormat) {
  const auto model = model::make_tiny_model({.dtype = "int8", .format = quant::Format::q8_0});
  const std::vector<TokenId> text = random_text();
  const KvSelftest found = measure_kv_format(*model, text, KvFormat::int8);
  const KvSelftest plain = measure_kv_format(*model, text, KvFormat::bf16);
  EXPECT_GT(found.floor_kl, 0.0);
  EXPECT_EQ(found.floor_kl, plain.mean_kl);
  EXPECT_EQ(plain.cost(), 0.0);
  EXPECT_DOUBLE_EQ(found.cost(), std::max(0.0, found.mean_kl - found.floor_kl));
  const KvSelftest broken{.format = KvFormat::int8, .mean_kl = std::numeric_limits<double>::infinity()};
  EXPECT_TRUE(std::isinf(broken.cost()));
}

TEST(KvSelftest, AShortContextIsReadAsFarAsItGoes) {
  const auto model = model::make_tiny_model({.max_position_embeddings = 100});
  const KvSelftest found = measure_kv_format(*model, random_text(), KvFormat::int8);
  EXPECT_EQ(found.num_tokens, 100);
  EXPECT_EQ(found.num_positions, 75);
  EXPECT_GT(found.mean_kl, 0.0);

  const auto shorter = model::make_tiny_model({.max_position_embeddings = kSelftestLeastTokens - 1});
  EXPECT_EQ(measure_kv_format(*shorter, random_text(), KvFormat::int8).num_positions, 0);
}

TEST(KvSelftest, AShortTextIsReadToItsEnd) {
  const auto model = model::make_tiny_model();
  EXPECT_EQ(measure_kv_format(*model, random_text(300), KvFormat::int8).num_positions, 300 - 75);
  EXPECT_EQ(measure_kv_format(*model, {}, KvFormat::int8).num_positions, 0);
}

TEST(KvSelftest, PredictionsThatAreNoNumbersAreNotWithinAnyLimit) {
  const std::vector<TokenId> text = random_text();
  const auto model = model::make_tiny_model({.nan_token = text[300]});
  const KvSelftest found = measure_kv_format(*model, text, KvFormat::mixed);
  EXPECT_TRUE(std::isinf(found.mean_kl));
  EXPECT_FALSE(is_within_limit(KvFormat::mixed, found.cost()));
}

TEST(KvSelftest, LimitsGrowAsBitsShrinkAndPlainFormatsHaveNone) {
  EXPECT_TRUE(is_within_limit(KvFormat::f32, 1.0));
  EXPECT_TRUE(is_within_limit(KvFormat::bf16, 1.0));
  const double int8 = quant::kv_format_info(KvFormat::int8).most_kl,
               mixed = quant::kv_format_info(KvFormat::mixed).most_kl;
  EXPECT_GT(int8, 0.0015);  // what a healthy small model loses at most
  EXPECT_GT(mixed, 0.009);
  EXPECT_LT(int8, mixed);
  EXPECT_FALSE(is_within_limit(KvFormat::int8, std::nextafter(int8, 1.0)));
}

TEST(KvSelftest, ARefusalNamesModelFormatFigureLimitAndTheWayOut) {
  const std::string text = kv_refusal(KvFormat::mixed, 0.25, "tiny.gguf", "force_it=True");
  for (const char* part : {"'mixed'", "tiny.gguf", "0.25", "0.036", "force_it=True"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in: " << text;
  }
}

}  // namespace
}  // namespace nb::engine
