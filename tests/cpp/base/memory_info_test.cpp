#include "base/memory_info.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace nb {
namespace {

TEST(MemoryInfo, ParsesKilobyteFields) {
  const std::string text = "MemTotal:       24684092 kB\nMemAvailable:   24136880 kB\nVmRSS:\nHuge: x kB\n";
  EXPECT_EQ(find_kilobyte_field(text, "MemTotal"), 24684092LL * 1024);
  EXPECT_EQ(find_kilobyte_field(text, "MemAvailable"), 24136880LL * 1024);
  EXPECT_EQ(find_kilobyte_field(text, "Mem"), -1);  // a key, not its beginning
  EXPECT_EQ(find_kilobyte_field(text, "Total"), -1);
  EXPECT_EQ(find_kilobyte_field(text, "VmRSS"), -1);
  EXPECT_EQ(find_kilobyte_field(text, "Huge"), -1);
  EXPECT_EQ(find_kilobyte_field("", "VmRSS"), -1);
}

TEST(MemoryInfo, SeesWhatThisProcessTouches) {
#ifndef __linux__
  GTEST_SKIP() << "read from /proc, which only Linux has";
#endif
  const MemoryInfo before = memory_info();
  EXPECT_GT(before.rss_bytes, 0);
  EXPECT_GE(before.peak_rss_bytes, before.rss_bytes);
  EXPECT_GT(before.available_bytes, 0);
  std::vector<char> touched(64 << 20);
  std::memset(touched.data(), 1, touched.size());
  const MemoryInfo after = memory_info();
  EXPECT_GE(after.rss_bytes, before.rss_bytes + (48 << 20)) << static_cast<int>(touched[12345]);
  EXPECT_GE(after.peak_rss_bytes, after.rss_bytes);
}

}  // namespace
}  // namespace nb
