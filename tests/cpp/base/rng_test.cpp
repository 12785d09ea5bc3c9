#include "base/rng.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace nb {
namespace {

// Known-answer vectors of the Random123 distribution (Salmon et al. 2011).
TEST(Philox, KnownAnswers) {
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(UniformAt, IsAPureFunctionOfItsArguments) {
  std::set<double> values;
  for (std::uint64_t seed : {0ull, 1ull, 1ull << 40}) {
    for (std::uint32_t choice : {0u, 1u}) {
      for (std::uint64_t position : {0ull, 1ull, 1ull << 33}) {
        const double value = uniform_at(seed, choice, position);
        EXPECT_EQ(value, uniform_at(seed, choice, position));
        EXPECT_GE(value, 0.0);
        EXPECT_LT(value, 1.0);
        values.insert(value);
      }
    }
  }
  EXPECT_EQ(values.size(), 18u);
}

TEST(UniformAt, IsUniform) {
  constexpr int kDraws = 100000, kBins = 50;
  int counts[kBins] = {};
  for (int i = 0; i < kDraws; ++i) ++counts[static_cast<int>(uniform_at(42, 0, static_cast<std::uint64_t>(i)) * kBins)];
  double chi_square = 0.0;
  for (int count : counts) chi_square += std::pow(count - kDraws / kBins, 2) / (kDraws / kBins);
  EXPECT_LT(chi_square, 85.4);  // 49 degrees of freedom, p = 0.001
}

TEST(RandomSeed, DiffersBetweenCalls) { EXPECT_NE(random_seed(), random_seed()); }

}  // namespace
}  // namespace nb
