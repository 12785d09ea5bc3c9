// checkpoint.cpp against words that are packed here, nibble by nibble, as the projects' documents say.
#include "quant/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>
#include <vector>

#include "base/code_of.h"
#include "base/dtype.h"
#include "base/error.h"

namespace nb::quant {
namespace {

// Codes [cols][rows], zero points and scales [groups][rows], as a quantizer has them.
struct Codes {
  Codes(std::int64_t num_rows, std::int64_t num_cols, std::int64_t size, unsigned seed)
      : rows(num_rows), cols(num_cols), group_size(size) {
    std::mt19937 random(seed);
    for (std::int64_t i = 0; i < rows * cols; ++i) codes.push_back(static_cast<std::uint32_t>(random() % 16));
    for (std::int64_t i = 0; i < rows * cols / group_size; ++i) {
      zeros.push_back(static_cast<std::uint32_t>(random() % 16));
      scales.push_back(f32_to_f16(0.001f * static_cast<float>(random() % 1000)));
    }
  }

  float weight(std::int64_t row, std::int64_t column, std::int64_t group) const {
    const auto at = static_cast<std::size_t>(group * rows + row);
    const auto code = static_cast<int>(codes[static_cast<std::size_t>(column * rows + row)]);
    return static_cast<float>(code - static_cast<int>(zeros[at])) * f16_to_f32(scales[at]);
  }

  std::int64_t rows, cols, group_size;
  std::vector<std::uint32_t> codes, zeros;
  std::vector<std::uint16_t> scales;
};

// Eight numbers to a word, place[i] is where number i of a word stands.
std::vector<std::uint32_t> pack_words(const std::vector<std::uint32_t>& numbers, const std::vector<int>& place) {
  std::vector<std::uint32_t> words(numbers.size() / 8);
  for (std::size_t i = 0; i < numbers.size(); ++i) words[i / 8] |= numbers[i] << 4 * place[i % 8];
  return words;
}

// AutoAWQ: `order_map = [0, 2, 4, 6, 1, 3, 5, 7]`, number order_map[i] goes to nibble i.
const std::vector<int> kAwqPlace = {0, 4, 1, 5, 2, 6, 3, 7};
const std::vector<int> kPlace = {0, 1, 2, 3, 4, 5, 6, 7};

// GPTQ's codes [cols / 8][rows]: eight columns to a word.
std::vector<std::uint32_t> pack_columns(const Codes& c) {
  std::vector<std::uint32_t> words(c.codes.size() / 8);
  for (std::int64_t k = 0; k < c.cols; ++k) {
    for (std::int64_t n = 0; n < c.rows; ++n) {
      words[static_cast<std::size_t>(k / 8 * c.rows + n)] |= c.codes[static_cast<std::size_t>(k * c.rows + n)]
                                                             << 4 * (k % 8);
    }
  }
  return words;
}

Format format_of(bool is_awq, std::int64_t group_size) {
  if (group_size == 128) return is_awq ? Format::awq_int4 : Format::gptq_int4;
  if (group_size == 64) return is_awq ? Format::awq_int4_g64 : Format::gptq_int4_g64;
  return is_awq ? Format::awq_int4_g32 : Format::gptq_int4_g32;
}

void expect_weights(const Codes& c, const Int4Checkpoint& source, const std::vector<std::int32_t>& groups) {
  const Format format = format_of(source.packing == Int4Packing::awq, c.group_size);
  const auto row_size = static_cast<std::size_t>(row_bytes(format, c.cols));
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(c.rows) * row_size, 0xcd);
  repack_int4(source, format, packed.data());
  std::vector<float> out(static_cast<std::size_t>(c.cols));
  for (std::int64_t row = 0; row < c.rows; ++row) {
    unpack_row(format, packed.data() + static_cast<std::size_t>(row) * row_size, c.cols, out.data());
    for (std::size_t j = 0; j < out.size(); ++j) {
      const auto column = source.order.empty() ? static_cast<std::int64_t>(j) : source.order[j];
      const std::int64_t group = groups.empty() ? column / c.group_size : groups[static_cast<std::size_t>(column)];
      ASSERT_EQ(std::bit_cast<std::uint32_t>(out[j]), std::bit_cast<std::uint32_t>(c.weight(row, column, group)))
          << to_string(format) << " row " << row << ", column " << column;
    }
  }
}

TEST(Checkpoint, AwqWordsHoldRowsInTheirOwnOrder) {
  // One word written by hand: rows 0 .. 7 of a column are 0 .. 7.
  std::vector<std::uint32_t> words(32, 0x75316420u);
  const std::vector<std::uint32_t> zeros = {0x00000000u};
  const std::vector<std::uint16_t> ones(8, 0x3c00);
  std::vector<std::uint8_t> packed(8 * 19);
  repack_int4({Int4Packing::awq, ZeroRule::stored, 8, 32, 32, words, zeros, ones, {}}, Format::awq_int4_g32,
              packed.data());
  std::vector<float> out(32);
  for (int row = 0; row < 8; ++row) {
    unpack_row(Format::awq_int4_g32, packed.data() + row * 19, 32, out.data());
    EXPECT_EQ(out, std::vector<float>(32, static_cast<float>(row)));
  }
}

TEST(Checkpoint, GptqWordsHoldColumns) {
  std::vector<std::uint32_t> words(4 * 8, 0x76543210u);  // columns 0 .. 7 of each row are 0 .. 7
  const std::vector<std::uint32_t> zeros = {0x77777777u};
  const std::vector<std::uint16_t> ones(8, 0x3c00);
  std::vector<std::uint8_t> packed(8 * 19);
  repack_int4({Int4Packing::gptq, ZeroRule::next, 8, 32, 32, words, zeros, ones, {}}, Format::gptq_int4_g32,
              packed.data());
  std::vector<float> out(32);
  unpack_row(Format::gptq_int4_g32, packed.data(), 32, out.data());
  for (std::size_t i = 0; i < 32; ++i) EXPECT_EQ(out[i], static_cast<float>(i % 8) - 8.0f);
}

TEST(Checkpoint, EveryGroupSizeIsBitEqual) {
  for (const std::int64_t group_size : {32, 64, 128}) {
    const Codes c(40, 384, group_size, static_cast<unsigned>(group_size));
    const auto awq = pack_words(c.codes, kAwqPlace), awq_zeros = pack_words(c.zeros, kAwqPlace);
    expect_weights(c, {Int4Packing::awq, ZeroRule::stored, c.rows, c.cols, group_size, awq, awq_zeros, c.scales, {}},
                   {});
    const auto gptq = pack_columns(c), zeros = pack_words(c.zeros, kPlace);
    expect_weights(c, {Int4Packing::gptq, ZeroRule::stored, c.rows, c.cols, group_size, gptq, zeros, c.scales, {}}, {});
  }
}

TEST(Checkpoint, ZeroPointsOfTheFirstVersionAreOneMore) {
  const Codes c(64, 64, 32, 3);
  const auto words = pack_columns(c);
  std::vector<std::uint32_t> less_one = c.zeros;
  for (std::uint32_t& zero : less_one) zero = (zero + 15) % 16;
  const auto each = pack_words(less_one, kPlace);
  expect_weights(c, {Int4Packing::gptq, ZeroRule::next, c.rows, c.cols, 32, words, each, c.scales, {}}, {});
  auto carried = pack_words(c.zeros, kPlace);
  for (std::uint32_t& word : carried) word -= 0x11111111u;
  EXPECT_NE(carried, each) << "zero points of 0 borrow";
  expect_weights(c, {Int4Packing::gptq, ZeroRule::carried, c.rows, c.cols, 32, words, carried, c.scales, {}}, {});
}

TEST(Checkpoint, ColumnsAreSortedByTheirGroups) {
  const Codes c(16, 256, 64, 5);
  std::vector<std::int32_t> groups;
  for (std::int32_t k = 0; k < 256; ++k) groups.push_back(k / 64);
  EXPECT_TRUE(order_of_groups(groups, 64).empty());
  std::mt19937 random(6);
  std::shuffle(groups.begin(), groups.end(), random);
  const std::vector<std::int32_t> order = order_of_groups(groups, 64);
  ASSERT_EQ(order.size(), 256u);
  for (std::size_t j = 0; j < order.size(); ++j) {
    EXPECT_EQ(groups[static_cast<std::size_t>(order[j])], static_cast<std::int32_t>(j / 64));
  }
  const auto words = pack_columns(c), zeros = pack_words(c.zeros, kPlace);
  expect_weights(c, {Int4Packing::gptq, ZeroRule::stored, c.rows, c.cols, 64, words, zeros, c.scales, order}, groups);
}

TEST(Checkpoint, GroupsThatAreNoneAreRefused) {
  std::vector<std::int32_t> groups(64, 0);
  std::fill(groups.begin() + 32, groups.end(), 1);
  EXPECT_TRUE(order_of_groups(groups, 32).empty());
  for (const std::int32_t bad : {-1, 2, 1 << 30}) {
    groups[40] = bad;
    EXPECT_EQ(code_of([&] { static_cast<void>(order_of_groups(groups, 32)); }), ErrorCode::format) << bad;
  }
  groups[40] = 0;
  EXPECT_EQ(code_of([&] { static_cast<void>(order_of_groups(groups, 32)); }), ErrorCode::unsupported);
}

}  // namespace
}  // namespace nb::quant
