#include "io/gguf_format.h"

#include <gtest/gtest.h>

#include "io/gguf_types.h"
#include "quant/format.h"

namespace nb::io {
namespace {

TEST(GgufFormat, AgreesWithTheTableOfFormats) {
  int supported = 0;
  for (std::uint32_t id = 0; id < 300; ++id) {
    const auto format = to_format(id);
    if (!format) continue;
    ++supported;
    const auto type = gguf_tensor_type(id);
    ASSERT_TRUE(type.has_value()) << id;
    const quant::FormatInfo& info = quant::format_info(*format);
    EXPECT_EQ(static_cast<std::uint32_t>(info.block_elements), type->block_elements) << type->name;
    EXPECT_EQ(static_cast<std::uint32_t>(info.block_bytes), type->block_bytes) << type->name;
    std::string lower = type->name;
    for (char& letter : lower) letter = static_cast<char>(letter >= 'A' && letter <= 'Z' ? letter + 32 : letter);
    EXPECT_EQ(lower, info.name);
  }
  EXPECT_EQ(supported, 11);
}

}  // namespace
}  // namespace nb::io
