#include "sampling/accept.h"

#include <gtest/gtest.h>

#include <vector>

namespace nb::sampling {
namespace {

using Tokens = std::vector<TokenId>;

TEST(CountAccepted, EndsWithTheFirstWrongGuess) {
  EXPECT_EQ(count_accepted(Tokens{1, 2, 3}, Tokens{1, 2, 3, 4}), 3);
  EXPECT_EQ(count_accepted(Tokens{1, 2, 3}, Tokens{1, 2, 4, kNotDrawn}), 2);
  EXPECT_EQ(count_accepted(Tokens{1, 2, 3}, Tokens{1, 5, 3, 4}), 1) << "what is right behind a wrong one is chance";
  EXPECT_EQ(count_accepted(Tokens{1, 2, 3}, Tokens{0, kNotDrawn, kNotDrawn, kNotDrawn}), 0);
}

TEST(CountAccepted, NothingIsRightWithoutAToken) {
  EXPECT_EQ(count_accepted(Tokens{}, Tokens{7}), 0);
  EXPECT_EQ(count_accepted(Tokens{7, 8}, Tokens{7}), 1);
  EXPECT_EQ(count_accepted(Tokens{7, 8}, Tokens{}), 0);
}

}  // namespace
}  // namespace nb::sampling
