// Packs weights for a file that is made once and read often: scales are searched, not computed from the extremes.
//
// `importance` says how much an error in each column matters: the mean square of the input that meets it. What is
// minimised per group is sum_j importance_j (w_j - unpacked_j)^2, over values as they are stored (fp16 scales and
// minima). f32, bf16 and f16 are rounded; formats of other projects are not offered. Not for the load path.
// Safe from any thread; the same input gives the same bytes for any number of threads.
#pragma once

#include <cstdint>

#include "base/threads.h"
#include "quant/format.h"

namespace nb::quant {

/// Packs [num_rows, num_cols] to `out`, num_rows * row_bytes bytes. `importance` f32[num_cols], or null: all columns
/// alike; negative or not finite values count as 0. Throws invalid_argument if a row does not fill whole blocks, or
/// naming the row of a weight that is not finite or that f16 cannot hold where it must; unsupported for other formats.
void quantize_rows(Format format, const float* rows, std::int64_t num_rows, std::int64_t num_cols,
                   const float* importance, std::uint8_t* out, ThreadPool& pool);

/// Sums over all weights.
struct PackingError {
  double squared_error = 0.0;  ///< of (weight - unpacked)^2
  double squared_norm = 0.0;   ///< of weight^2
};

/// What packing has cost: `packed` as quantize_rows made it from `rows`.
PackingError packing_error(Format format, const float* rows, const std::uint8_t* packed, std::int64_t num_rows,
                           std::int64_t num_cols, ThreadPool& pool);

// ---- one group, for tests ----

/// 64 weights to 36 bytes: | fp16 scale d | fp16 minimum m | 32 bytes of codes |, value = d * code + m.
void pack_w4_group(const float* weights, const float* importance, std::uint8_t* out);

/// `count` weights to one fp16 scale and signed codes: value = d * code. Returns the scale's bits.
std::uint16_t pack_w8_group(const float* weights, const float* importance, std::int64_t count, std::int8_t* codes);

}  // namespace nb::quant
