// The CPU weight layout: tiles of 16 output rows by 32, 64 or 256 input columns, repacked from file rows without loss.
//
// Lane r of every vector belongs to output row r, so kernels need no horizontal sums. A strip is the tiles of 16 rows
// in column order, one sequential stream. Layouts are drawn in tile16.cpp, packing is in tile16_pack.cpp, sizes are
// in tile_shape.h. Safe from any thread.
#pragma once

#include <cstdint>

#include "quant/format.h"

namespace nb::quant {

inline constexpr int kTileRows = 16;

/// Bytes of one strip of a matrix with `cols` columns (rounded up to whole tiles).
std::int64_t strip_bytes(Format format, std::int64_t cols);

/// Packs 16 rows of `cols` weights (whole blocks) into a strip. `rows[r]` is a row in file layout; null packs zeros.
/// Columns beyond `cols` are packed as zeros.
void pack_strip(Format format, const std::uint8_t* const rows[kTileRows], std::int64_t cols, std::uint8_t* strip);

/// Unpacks row `row` (0..15) of a strip of `cols` columns to f32, bit-equal to unpack_row of the source row.
void unpack_strip_row(Format format, const std::uint8_t* strip, std::int64_t cols, int row, float* out);

}  // namespace nb::quant
