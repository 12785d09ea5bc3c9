#include "quant/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/error.h"

namespace nb::quant {
namespace {

// Which nibble of a word has row i of its 8.
constexpr int kAwqNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

int nibble_of(Int4Packing packing, std::int64_t row) {
  return packing == Int4Packing::awq ? kAwqNibble[row % 8] : static_cast<int>(row % 8);
}

int zero_of(std::uint32_t word, int nibble, ZeroRule rule) {
  if (rule == ZeroRule::carried) word += 0x11111111u;
  const int stored = static_cast<int>(word >> 4 * nibble & 15);
  return rule == ZeroRule::next ? (stored + 1) & 15 : stored;
}

}  // namespace

std::vector<std::int32_t> order_of_groups(std::span<const std::int32_t> groups, std::int64_t group_size) {
  const auto num_groups = static_cast<std::int64_t>(groups.size()) / group_size;
  std::vector<std::int64_t> members(static_cast<std::size_t>(num_groups));
  for (std::size_t k = 0; k < groups.size(); ++k) {
    NB_CHECK(groups[k] >= 0 && groups[k] < num_groups, format, "column ", k, " is in group ", groups[k], ", there are ",
             num_groups);
    ++members[static_cast<std::size_t>(groups[k])];
  }
  for (std::size_t g = 0; g < members.size(); ++g) {
    NB_CHECK(members[g] == group_size, unsupported, "group ", g, " has ", members[g], " columns, expected ", group_size,
             ": groups of different sizes are not offered");
  }
  if (std::is_sorted(groups.begin(), groups.end())) return {};
  std::vector<std::int32_t> order(groups.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    const std::int32_t group_a = groups[static_cast<std::size_t>(a)], group_b = groups[static_cast<std::size_t>(b)];
    return group_a != group_b ? group_a < group_b : a < b;
  });
  return order;
}

void repack_int4(const Int4Checkpoint& source, Format format, std::uint8_t* out) {
  const FormatInfo& info = format_info(format);
  NB_ASSERT(info.has_zeros && info.block_elements == source.group_size);
  const std::int64_t words = source.rows / 8, num_groups = source.cols / source.group_size;
  const bool is_awq = source.packing == Int4Packing::awq;
  for (std::int64_t row = 0; row < source.rows; ++row) {
    const int nibble = nibble_of(source.packing, row);
    const auto code_of = [&](std::int64_t column) {
      const std::int64_t k = source.order.empty() ? column : source.order[static_cast<std::size_t>(column)];
      const std::int64_t at = is_awq ? k * words + row / 8 : k / 8 * source.rows + row;
      return static_cast<int>(source.codes[static_cast<std::size_t>(at)] >> 4 * (is_awq ? nibble : k % 8) & 15);
    };
    for (std::int64_t group = 0; group < num_groups; ++group, out += info.block_bytes) {
      std::memcpy(out, &source.scales[static_cast<std::size_t>(group * source.rows + row)], 2);
      const std::uint32_t word = source.zeros[static_cast<std::size_t>(group * words + row / 8)];
      out[2] = static_cast<std::uint8_t>(zero_of(word, nibble, source.zero_rule));
      std::uint8_t* bytes = out + 3;
      for (std::int64_t first = group * source.group_size; first < (group + 1) * source.group_size; first += 32) {
        for (std::int64_t i = first; i < first + 16; ++i) {
          *bytes++ = static_cast<std::uint8_t>(code_of(i) | code_of(i + 16) << 4);
        }
      }
    }
  }
}

}  // namespace nb::quant
