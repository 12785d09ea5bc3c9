// The table of weight formats: one row per format, with its block size and its reference unpacking.
//
// Bit layouts are drawn in format.cpp. Not for tiles (tile16.h) and not for KV (kv/kv_format.h). Safe from any thread.
#pragma once

#include <cstdint>
#include <string>

#include "quant/format_id.h"

namespace nb::quant {

struct FormatInfo {
  Format format;
  const char* name;
  int block_elements;  ///< weights of one block, along a row
  int block_bytes;     ///< bytes of one block in a file
  int tile_bytes;      ///< bytes of one 16-row, 32-column tile (tile16.h)
  bool is_quantized;   ///< holds integer codes, so it can meet int8 activations
  /// Writes the `block_elements` values of one block. Arithmetic in f32, one rounding per operation.
  void (*unpack_block)(const std::uint8_t* block, float* out);
};

/// The row of the table.
const FormatInfo& format_info(Format format);

inline const char* to_string(Format format) { return format_info(format).name; }

/// Throws unsupported naming `name` if there is no such format.
Format parse_format(const std::string& name);

/// Bytes of `num_elements` weights; throws invalid_argument if they do not fill whole blocks.
std::int64_t row_bytes(Format format, std::int64_t num_elements);

/// Unpacks one row of whole blocks to f32.
void unpack_row(Format format, const std::uint8_t* row, std::int64_t num_elements, float* out);

/// Packs a row (whole blocks) with the plain recipe of each format: scale from the extreme value, round to nearest.
/// f32, bf16 and f16 round to nearest even. For tests and exports without calibration.
void pack_row(Format format, const float* values, std::int64_t num_elements, std::uint8_t* out);

}  // namespace nb::quant
