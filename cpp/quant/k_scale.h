// The 6-bit scales in the head of a Q4_K or Q5_K block, drawn in format.cpp.
//
// Shared by the reader of rows and the packer of tiles. Safe from any thread.
#pragma once

#include <cstdint>

namespace nb::quant {

struct KScale {
  int scale, minimum;  ///< 0 .. 63
};

/// Scale and minimum of group g (0 .. 7) of a block.
inline KScale k_scale(const std::uint8_t* block, int g) {
  const std::uint8_t* s = block + 4;
  if (g < 4) return {s[g] & 63, s[g + 4] & 63};
  return {(s[g + 4] & 15) | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4};
}

}  // namespace nb::quant
