#include "io/weight_check.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "io/braid_builder.h"
#include "io/braid_source.h"

namespace nb::io {
namespace {

TEST(WeightCheck, FindsNanAndInfinityInEveryFormat) {
  test::BraidBuilder builder;
  builder.tensor({.name = "clean", .format = 0, .dims = {4, 4}, .bytes = 64})
      .tensor({.name = "floats", .format = 0, .dims = {300, 1000}, .bytes = 1200000})
      .tensor({.name = "half", .format = 1, .dims = {8}, .bytes = 16})
      .tensor({.name = "blocks", .format = 20, .dims = {2, 64}, .bytes = 136})
      .tensor({.name = "later", .format = 4, .dims = {2, 128}, .bytes = 150});
  test::BraidImage image = builder.build();
  const BraidFile file(image.bytes, "weights");
  for (const BraidTensor& tensor : file.tensors()) std::memset(image.bytes.data() + tensor.offset, 0, tensor.bytes);
  const auto source = open_braid(std::make_shared<const BraidFile>(image.bytes, "weights"));
  const auto offset = [&](const char* name) { return file.find_tensor(name)->offset; };

  std::uint64_t last = 0;
  const WeightCheck clean = check_weights(*source, [&](std::uint64_t done, std::uint64_t all) {
    EXPECT_EQ(all, 64u + 1200000 + 16 + 136 + 150);
    last = done;
  });
  EXPECT_TRUE(clean.nonfinite.empty());
  EXPECT_EQ(last, 64u + 1200000 + 16 + 136 + 150);
  ASSERT_EQ(clean.skipped.size(), 1u);
  EXPECT_EQ(clean.skipped[0].name, "later");

  image.put(offset("floats") + 4 * 299999, std::numeric_limits<float>::quiet_NaN());
  image.put(offset("floats") + 4 * 5, -std::numeric_limits<float>::infinity());
  image.put(offset("floats") + 4 * 6, std::numeric_limits<float>::infinity());
  image.put<std::uint16_t>(offset("half") + 6, 0x7e00);     // NaN
  image.put<std::uint16_t>(offset("blocks") + 68, 0x7c00);  // an infinite scale: 0 * inf is NaN, 1 * inf is not
  image.put<std::int8_t>(offset("blocks") + 68 + 2, 1);
  const WeightCheck found = check_weights(*source);
  ASSERT_EQ(found.nonfinite.size(), 3u);
  EXPECT_EQ(found.nonfinite[0].name, "floats");
  EXPECT_EQ(found.nonfinite[0].num_nan, 1u);
  EXPECT_EQ(found.nonfinite[0].num_infinite, 2u);
  EXPECT_EQ(found.nonfinite[1].name, "half");
  EXPECT_EQ(found.nonfinite[1].num_nan, 1u);
  EXPECT_EQ(found.nonfinite[2].name, "blocks");
  EXPECT_EQ(found.nonfinite[2].num_nan, 31u);
  EXPECT_EQ(found.nonfinite[2].num_infinite, 1u);
}

}  // namespace
}  // namespace nb::io
