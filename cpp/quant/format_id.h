// Identifiers of the weight formats, free of C++ library headers for code compiled per instruction set.
//
// The table behind them is in format.h. Safe from any thread.
#pragma once

#include <stdint.h>

namespace nb::quant {

enum class Format : uint8_t {
  f32,
  bf16,
  f16,
  q4_0,
  q4_1,
  q8_0,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  w8,
  w8_channel,
  w4,
  awq_int4,
  awq_int4_g64,
  awq_int4_g32,
  gptq_int4,
  gptq_int4_g64,
  gptq_int4_g32,
  fp8_e4m3
};

inline constexpr int kNumFormats = 21;

/// The format whose layout and arithmetic `format` shares: checkpoints of GPTQ and AWQ differ in their name only.
constexpr Format kernel_format(Format format) {
  switch (format) {
    case Format::gptq_int4:
      return Format::awq_int4;
    case Format::gptq_int4_g64:
      return Format::awq_int4_g64;
    case Format::gptq_int4_g32:
      return Format::awq_int4_g32;
    default:
      return format;
  }
}

enum class KvFormat : uint8_t { f32, bf16, f16, int8, mixed, int4 };

inline constexpr int kNumKvFormats = 6;

/// Whether keys are quantized when the 16 of a block are there, and lie un-rotated in an open cell until then.
inline constexpr bool seals_keys(KvFormat format) { return format == KvFormat::int4; }

/// Dimensions that share a scale and a minimum in the values of `mixed` and `int4`.
inline constexpr int kKvGroup = 32;

}  // namespace nb::quant
