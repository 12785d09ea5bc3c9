// Scalar element types and exact conversions between 32-bit and 16-bit floats.
//
// Block formats of weights are not dtypes: they live in quant/format.h. Safe to use from any thread.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace nb {

enum class DType : std::uint8_t { f32, bf16, f16, i8, i32 };

/// Bytes of one element.
constexpr std::size_t dtype_bytes(DType type) {
  switch (type) {
    case DType::f32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::f16:
      return 2;
    case DType::i8:
      return 1;
    case DType::i32:
      return 4;
  }
  return 0;
}

/// "f32", "bf16", ...
const char* to_string(DType type);

/// Exact.
inline float bf16_to_f32(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

/// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline std::uint16_t f32_to_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Exact; handles subnormals, infinities and NaN.
inline float f16_to_f32(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shift into the exponent field of an f32 and multiply by 2^112 to correct the bias: exact for subnormals too.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

/// Rounds to nearest even; overflow becomes infinity; a NaN stays a NaN.
std::uint16_t f32_to_f16(float value);

/// Exact. The 8-bit float of OCP (E4M3): bias 7, no infinities, largest 448; 0x7f and 0xff are NaN.
inline float e4m3_to_f32(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80u) << 24;
  const std::uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  // As above: the exponent's bias is corrected by a product, which is exact for subnormals too.
  return std::bit_cast<float>(sign | magnitude << 20) * 0x1p120f;
}

/// Rounds to nearest even; what is larger than 448 becomes 448, a NaN stays a NaN.
std::uint8_t f32_to_e4m3(float value);

}  // namespace nb
