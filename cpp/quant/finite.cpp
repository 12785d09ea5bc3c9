#include "quant/finite.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/dtype.h"
#include "quant/format.h"

namespace nb::quant {
namespace {

// Where a block holds its f16 scale and minimum. A value is scale * integer (+ or - minimum * integer), so that it is
// finite exactly if these are.
struct ScaleRow {
  const char* name;    // as in the table of format.h
  int scale, minimum;  // byte offsets; the same twice if there is one only
  bool is_per_row;     // one block a row, whatever its length
};

constexpr ScaleRow kScales[] = {
    {"q4_0", 0, 0, false},
    {"q4_1", 0, 2, false},
    {"q5_0", 0, 0, false},
    {"q5_1", 0, 2, false},
    {"q8_0", 0, 0, false},
    {"q4_k", 0, 2, false},
    {"q5_k", 0, 2, false},
    {"q6_k", 208, 208, false},
    {"w8", 0, 0, false},
    {"w8_channel", 0, 0, true},
    {"w4", 0, 2, false},
    {"awq_int4", 0, 0, false},
    {"awq_int4_g64", 0, 0, false},
    {"awq_int4_g32", 0, 0, false},
    {"gptq_int4", 0, 0, false},
    {"gptq_int4_g64", 0, 0, false},
    {"gptq_int4_g32", 0, 0, false},
};

using FormatScales = std::array<const ScaleRow*, static_cast<std::size_t>(kNumFormats)>;

FormatScales find_scales() {
  FormatScales found{};
  for (int i = 0; i < kNumFormats; ++i) {
    for (const ScaleRow& row : kScales) {
      if (std::strcmp(row.name, to_string(static_cast<Format>(i))) == 0) found[static_cast<std::size_t>(i)] = &row;
    }
  }
  return found;
}

// Whether no element has all bits of `exponent`. A maximum of signed integers is what every vector unit has.
template <class T>
bool is_finite(const std::uint8_t* row, std::int64_t count, T exponent) {
  T largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    T bits;
    std::memcpy(&bits, row + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    largest = std::max(largest, static_cast<T>(bits & exponent));
  }
  return largest != exponent;
}

// Of 8-bit floats: whether the scale is finite, no code is NaN, and no product of the two overflows.
bool is_finite_fp8(const std::uint8_t* row, std::int64_t count) {
  float scale;
  std::memcpy(&scale, row, sizeof(scale));
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<std::uint8_t>(row[4 + i] & 0x7f));
  return std::isfinite(scale) && std::isfinite(e4m3_to_f32(largest) * scale);
}

constexpr std::int16_t kF16Exponent = 0x7c00, kBf16Exponent = 0x7f80;
constexpr std::int32_t kF32Exponent = 0x7f800000;

}  // namespace

bool is_finite_row(Format format, const std::uint8_t* row, std::int64_t num_elements) {
  if (format == Format::f32) return is_finite(row, num_elements, kF32Exponent);
  if (format == Format::bf16) return is_finite(row, num_elements, kBf16Exponent);
  if (format == Format::f16) return is_finite(row, num_elements, kF16Exponent);
  if (format == Format::fp8_e4m3) return is_finite_fp8(row, num_elements);
  static const FormatScales scales = find_scales();
  const ScaleRow* at = scales[static_cast<std::size_t>(format)];
  if (at == nullptr) {
    std::vector<float> values(static_cast<std::size_t>(num_elements));
    unpack_row(format, row, num_elements, values.data());
    return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
  }
  const FormatInfo& info = format_info(format);
  const std::int64_t num_blocks = at->is_per_row ? 1 : num_elements / info.block_elements;
  bool all_finite = true;
  for (std::int64_t i = 0; i < num_blocks; ++i, row += info.block_bytes) {
    all_finite &= is_finite(row + at->scale, 1, kF16Exponent) && is_finite(row + at->minimum, 1, kF16Exponent);
  }
  return all_finite;
}

}  // namespace nb::quant
