// Identifiers of the weight formats, free of C++ library headers for code compiled per instruction set.
//
// The table behind them is in format.h. Safe from any thread.
#pragma once

#include <stdint.h>

namespace nb::quant {

enum class Format : uint8_t { f32, bf16, f16, q4_0, q4_1, q8_0, q5_0, q5_1, q4_k, q5_k, q6_k, w8, w8_channel, w4 };

inline constexpr int kNumFormats = 14;

enum class KvFormat : uint8_t { f32, bf16, f16, int8, mixed, int4 };

inline constexpr int kNumKvFormats = 6;

/// Whether keys are quantized when the 16 of a block are there, and lie un-rotated in an open cell until then.
inline constexpr bool seals_keys(KvFormat format) { return format == KvFormat::int4; }

/// Dimensions that share a scale and a minimum in the values of `mixed` and `int4`.
inline constexpr int kKvGroup = 32;

}  // namespace nb::quant
