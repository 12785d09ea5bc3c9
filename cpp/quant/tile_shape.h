// What a kernel knows about the 16-row tiles of each weight format, at compile time.
//
// Free of C++ library headers: code compiled per instruction set includes it. The layouts themselves are drawn in
// tile16.cpp. Safe from any thread.
#pragma once

#include "quant/format_id.h"

namespace nb::quant {

/// A strip is `header_bytes`, then tiles of 16 rows by `cols` columns. A tile is `groups` pieces of codes, each of
/// `group_bytes` for 32 columns, then `scale_bytes` of scales.
struct TileShape {
  int cols;          ///< columns of one tile, a multiple of 32
  int code_bits;     ///< bits of one weight's code, or of the whole weight if the format has no scales
  int zero;          ///< the code that means zero; 0 where codes start from a minimum
  bool has_minimum;  ///< weight = scale * code + minimum
  bool has_zeros;    ///< weight = scale * (code - zero point of the tile's row)
  int scale_bytes;   ///< scales of one tile
  int header_bytes;  ///< scales of the whole strip, at its head

  // What follows from the above. Data and not functions: an inline function could be emitted with one instruction set
  // and be linked for all.
  int groups = cols / 32;
  int group_bytes = 64 * code_bits;
  int tile_bytes = groups * group_bytes + scale_bytes;
};

/// In code compiled per instruction set: only where a constant is required, for the same reason.
constexpr TileShape tile_shape(Format format) {
  constexpr TileShape kShapes[kNumFormats] = {
      {32, 32, 0, false, false, 0, 0},     // f32
      {32, 16, 0, false, false, 0, 0},     // bf16
      {32, 16, 0, false, false, 0, 0},     // f16
      {32, 4, 8, false, false, 32, 0},     // q4_0
      {32, 4, 0, true, false, 64, 0},      // q4_1
      {32, 8, 128, false, false, 32, 0},   // q8_0
      {32, 5, 16, false, false, 32, 0},    // q5_0
      {32, 5, 0, true, false, 64, 0},      // q5_1
      {256, 4, 0, true, false, 320, 0},    // q4_k
      {256, 5, 0, true, false, 320, 0},    // q5_k
      {256, 6, 32, false, false, 288, 0},  // q6_k
      {64, 8, 128, false, false, 32, 0},   // w8
      {32, 8, 128, false, false, 0, 32},   // w8_channel
      {64, 4, 0, true, false, 64, 0},      // w4
      {128, 4, 0, false, true, 48, 0},     // awq_int4
      {64, 4, 0, false, true, 48, 0},      // awq_int4_g64
      {32, 4, 0, false, true, 48, 0},      // awq_int4_g32
      {128, 4, 0, false, true, 48, 0},     // gptq_int4
      {64, 4, 0, false, true, 48, 0},      // gptq_int4_g64
      {32, 4, 0, false, true, 48, 0},      // gptq_int4_g32
      {32, 8, 0, false, false, 0, 64},     // fp8_e4m3
  };
  return kShapes[static_cast<int>(format)];
}

}  // namespace nb::quant
