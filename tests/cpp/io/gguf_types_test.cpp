#include "io/gguf_types.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace nb::io {
namespace {

// Bits per weight as ggml publishes them for each format.
TEST(GgufTypes, BitsPerWeight) {
  struct Row {
    std::uint32_t id;
    const char* name;
    double bits;
  };
  const Row rows[] = {{0, "F32", 32},          {1, "F16", 16},        {2, "Q4_0", 4.5},        {3, "Q4_1", 5},
                      {6, "Q5_0", 5.5},        {7, "Q5_1", 6},        {8, "Q8_0", 8.5},        {9, "Q8_1", 9},
                      {10, "Q2_K", 2.625},     {11, "Q3_K", 3.4375},  {12, "Q4_K", 4.5},       {13, "Q5_K", 5.5},
                      {14, "Q6_K", 6.5625},    {15, "Q8_K", 9.125},   {16, "IQ2_XXS", 2.0625}, {17, "IQ2_XS", 2.3125},
                      {18, "IQ3_XXS", 3.0625}, {19, "IQ1_S", 1.5625}, {20, "IQ4_NL", 4.5},     {21, "IQ3_S", 3.4375},
                      {22, "IQ2_S", 2.5625},   {23, "IQ4_XS", 4.25},  {24, "I8", 8},           {25, "I16", 16},
                      {26, "I32", 32},         {27, "I64", 64},       {28, "F64", 64},         {29, "IQ1_M", 1.75},
                      {30, "BF16", 16},        {34, "TQ1_0", 1.6875}, {35, "TQ2_0", 2.0625},   {39, "MXFP4", 4.25},
                      {40, "NVFP4", 4.5}};
  std::set<std::uint32_t> known;
  for (const Row& row : rows) {
    known.insert(row.id);
    const auto type = gguf_tensor_type(row.id);
    ASSERT_TRUE(type.has_value()) << row.id;
    EXPECT_STREQ(type->name, row.name);
    EXPECT_EQ(8.0 * type->block_bytes / type->block_elements, row.bits) << row.name;
    EXPECT_EQ(gguf_tensor_type_name(row.id), row.name);
  }
  for (std::uint32_t id = 0; id < 300; ++id) EXPECT_EQ(gguf_tensor_type(id).has_value(), known.count(id) == 1) << id;
  EXPECT_EQ(gguf_tensor_type_name(31), "type 31");
}

}  // namespace
}  // namespace nb::io
