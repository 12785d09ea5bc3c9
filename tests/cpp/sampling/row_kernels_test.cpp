#include "sampling/row_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace nb::sampling {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kHuge = std::numeric_limits<float>::max();
constexpr std::size_t kBlocks = 300;

/// Everyday logits, then every kind of value that the loops treat in a way of its own.
std::vector<float> hard_logits() {
  std::mt19937 random(9);
  std::normal_distribution<float> normal(0.0f, 20.0f);
  const std::vector<float> special{kNan,    -kNan, kInfinity,     -kInfinity, kHuge,  -kHuge,
                                   -0.0f,   0.0f,  1e-40f,        -1e-40f,    -86.6f, -86.7f,
                                   -86.64f, 30.0f, 30.0f - 86.6f, 1e30f,      -1e30f, 0x1p-126f};
  std::vector<float> logits(kBlocks * kBlockLogits);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const std::size_t block = i / kBlockLogits;
    const bool is_special = block % 3 == 1 ? random() % 5 == 0 : block % 3 == 2;
    logits[i] = is_special ? special[random() % special.size()] : normal(random);
  }
  std::fill_n(logits.begin() + 5 * kBlockLogits, kBlockLogits, kNan);
  std::fill_n(logits.begin() + 8 * kBlockLogits, kBlockLogits, -kInfinity);
  return logits;
}

// Bytes, so that the sign of zero and what a NaN holds count too.
bool same_bytes(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(RowKernels, EveryInstructionSetGivesTheBitsOfPlainCpp) {
  const auto logits = hard_logits();
  ASSERT_STREQ(row_kernels().front().name, "plain");
  for (const float max : {kHuge, 120.0f, 30.0f}) {
    for (const float scale : {1.0f, 1.25f, 0.3f, 1e-37f, 1e38f}) {
      std::vector<float> bounded = logits;
      for (float& logit : bounded) logit = logit > max && logit != kInfinity ? max : logit;
      if (max != kHuge) std::replace(bounded.begin(), bounded.end(), kInfinity, max);
      const RowKernels& plain = row_kernels().front();
      std::vector<float> maxima(kBlocks), sums(kBlocks), weights(bounded.size());
      plain.maxima(bounded.data(), kBlocks, maxima.data());
      plain.sums(bounded.data(), kBlocks, max, scale, sums.data());
      plain.weights(bounded.data(), kBlocks, max, scale, weights.data());
      for (const RowKernels& kernels : row_kernels()) {
        SCOPED_TRACE(std::string(kernels.name) + " max " + std::to_string(max) + " scale " + std::to_string(scale));
        std::vector<float> own_maxima(kBlocks, 7.0f), own_sums(kBlocks, 7.0f), own_weights(bounded.size(), 7.0f);
        kernels.maxima(bounded.data(), kBlocks, own_maxima.data());
        kernels.sums(bounded.data(), kBlocks, max, scale, own_sums.data());
        kernels.weights(bounded.data(), kBlocks, max, scale, own_weights.data());
        EXPECT_EQ(maxima, own_maxima);  // zeros of either sign are one maximum
        EXPECT_TRUE(same_bytes(sums, own_sums));
        EXPECT_TRUE(same_bytes(weights, own_weights));
      }
    }
  }
}

TEST(RowKernels, MaximaAreThoseOfALoop) {
  const auto logits = hard_logits();
  for (const RowKernels& kernels : row_kernels()) {
    std::vector<float> maxima(kBlocks);
    kernels.maxima(logits.data(), kBlocks, maxima.data());
    for (std::size_t block = 0; block < kBlocks; ++block) {
      float best = -kInfinity;
      for (std::size_t i = 0; i < kBlockLogits; ++i) {
        const float logit = logits[block * kBlockLogits + i];
        if (logit > best) best = logit;
      }
      EXPECT_EQ(maxima[block], best) << kernels.name << " block " << block;
    }
  }
}

TEST(RowKernels, ReachingNamesTheLogitsFromAFloorUp) {
  const auto logits = hard_logits();
  for (const RowKernels& kernels : row_kernels()) {
    for (std::size_t block = 0; block < kBlocks; ++block) {
      const float* const begin = logits.data() + block * kBlockLogits;
      for (const float floor : {-kHuge, -86.6f, -0.0f, 0.0f, 3.0f, begin[63], kHuge}) {
        std::uint64_t expected = 0;
        for (std::size_t i = 0; i < kBlockLogits; ++i) expected |= std::uint64_t{begin[i] >= floor} << i;
        EXPECT_EQ(kernels.reaching(begin, floor), expected) << kernels.name << " block " << block << " floor " << floor;
      }
    }
  }
}

// The order that the sums are documented to have, written out.
TEST(RowKernels, SumsAddEightLanesThenFoldThem) {
  std::mt19937 random(4);
  std::uniform_real_distribution<float> uniform(-3.0f, 0.0f);
  std::vector<float> logits(kBlocks * kBlockLogits);
  for (float& logit : logits) logit = uniform(random);
  for (const RowKernels& kernels : row_kernels()) {
    std::vector<float> sums(kBlocks), w(logits.size());
    kernels.sums(logits.data(), kBlocks, 0.0f, 1.0f, sums.data());
    kernels.weights(logits.data(), kBlocks, 0.0f, 1.0f, w.data());
    for (std::size_t block = 0; block < kBlocks; ++block) {
      float lanes[8] = {};
      for (std::size_t i = 0; i < kBlockLogits; ++i) lanes[i % 8] += w[block * kBlockLogits + i];
      const float even = (lanes[0] + lanes[4]) + (lanes[2] + lanes[6]);
      const float odd = (lanes[1] + lanes[5]) + (lanes[3] + lanes[7]);
      EXPECT_EQ(sums[block], even + odd) << kernels.name << " block " << block;
    }
  }
}

}  // namespace
}  // namespace nb::sampling
