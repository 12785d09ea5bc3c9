// The table of weight formats: one row per format, with its block size and its reference unpacking.
//
// Bit layouts are drawn in format.cpp; the recipes of pack_row are in pack.cpp. Not for tiles (tile16.h) and not for KV
// (kv_format.h). Safe from any thread.
#pragma once

#include <cstdint>
#include <string>

#include "quant/format_id.h"

namespace nb::quant {

/// Weights of one code group: what one scale of int8 activations covers.
inline constexpr int kGroupCols = 32;

/// 32 weights of a quantized row: weight i = scales[i / 16] * (codes[i] - zero), or scales[i / 16] * codes[i] +
/// minimum where the format has minima. Arithmetic in f32, one rounding per operation. `zero` is the format's or, where
/// it has zero points, the group's.
struct CodeGroup {
  std::uint8_t codes[kGroupCols];
  float scales[2];  ///< of the first and of the last 16; equal unless the format has sub-blocks of 16
  float minimum;    ///< 0 where the format has none
  int zero = 0;     ///< set where the format has zero points only: FormatInfo::zero_of
};

struct FormatInfo {
  Format format;
  const char* name;
  int block_elements;    ///< weights of one block, along a row
  int block_bytes;       ///< bytes of one block in a file
  int row_header_bytes;  ///< bytes at the head of each row, before its blocks
  int zero;              ///< the code that means zero, see CodeGroup
  bool has_minimum;      ///< see CodeGroup
  bool has_zeros;        ///< see CodeGroup
  /// Reads weights [32 * group, 32 * group + count) of a row; codes beyond `count` are `zero`. Null if the format
  /// holds no integer codes. `count` < 32 happens only where blocks are shorter than a group.
  void (*read_group)(const std::uint8_t* row, std::int64_t group, int count, CodeGroup& out);

  /// Holds integer codes, so it can meet int8 activations.
  bool is_quantized() const { return read_group != nullptr; }

  /// Holds numbers as they are, without scales.
  bool is_plain() const { return format == Format::f32 || format == Format::bf16 || format == Format::f16; }

  /// The code that means zero in a group that was read.
  int zero_of(const CodeGroup& group) const { return has_zeros ? group.zero : zero; }
};

/// The row of the table.
const FormatInfo& format_info(Format format);

inline const char* to_string(Format format) { return format_info(format).name; }

/// Throws unsupported naming `name` if there is no such format.
Format parse_format(const std::string& name);

/// Bytes of a row of `num_elements` weights; throws invalid_argument if they do not fill whole blocks.
std::int64_t row_bytes(Format format, std::int64_t num_elements);

/// Unpacks one row of whole blocks to f32.
void unpack_row(Format format, const std::uint8_t* row, std::int64_t num_elements, float* out);

/// Packs a row (whole blocks) with the plain recipe of each format: scale from the extreme value, round to nearest.
/// f32, bf16 and f16 round to nearest even. For tests and exports without calibration. Throws invalid_argument if a
/// quantized format is given a value that is not finite, or whose scale overflows f16.
void pack_row(Format format, const float* values, std::int64_t num_elements, std::uint8_t* out);

}  // namespace nb::quant
