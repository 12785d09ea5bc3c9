#include "text/selftest_text.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace nb::text {
namespace {

TEST(SelftestText, IsPlainAsciiWithoutControls) {
  for (const char c : selftest_text()) EXPECT_TRUE(c == '\n' || (c >= ' ' && c <= '~')) << static_cast<int>(c);
}

TEST(SelftestText, HasMoreThan512TokensEvenWhereATokenIsAWord) {
  const std::string_view text = selftest_text();
  int words = 0;
  for (std::size_t i = 1; i < text.size(); ++i) words += (text[i - 1] == ' ' || text[i - 1] == '\n') && text[i] > ' ';
  EXPECT_GE(words, 512);
}

}  // namespace
}  // namespace nb::text
