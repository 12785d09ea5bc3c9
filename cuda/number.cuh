// Types of numbers in memory: bf16 and fp16 as two bytes, and vectors of 16 bytes of them.
//
// Own types, so that host code and the emulator need no CUDA headers. Rounding is to nearest even.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace nb::cuda {

struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};
/// A signed byte of a row of quant::Format::q8_0: a number when it is multiplied with the scale of its 32 columns.
struct SignedByte {
  std::uint8_t bits;
};

/// Whether numbers of a row are codes, whose scales stand behind them (weight.cuh).
template <class Number>
inline constexpr bool kIsScaled = false;
template <>
inline constexpr bool kIsScaled<SignedByte> = true;

NB_DEVICE float bits_to_float(unsigned bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

NB_DEVICE unsigned float_to_bits(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

NB_DEVICE float to_float(float value) { return value; }
NB_DEVICE float to_float(Bf16 value) { return bits_to_float(static_cast<unsigned>(value.bits) << 16); }
NB_DEVICE float to_float(Fp16 value) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const unsigned sign = (value.bits & 0x8000u) << 16;
  const unsigned magnitude = value.bits & 0x7fffu;
  // Multiplying by 2^112 moves the exponent from bias 15 to 127, for subnormal numbers too; infinity and NaN are left.
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
#endif
}

/// NaN stays NaN.
NB_DEVICE Bf16 to_bf16(float value) {
  const unsigned bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline constexpr Fp16 kFp16Nan = {0x7e00};

/// Rounds within the finite numbers of fp16. NaN stays NaN.
NB_DEVICE Fp16 near_fp16(float value) {
  constexpr float kLargest = 65504.0f;
  const float near = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
#if defined(__CUDACC__)
  return {__half_as_ushort(__float2half_rn(near))};
#else
  const unsigned bits = float_to_bits(near), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kFp16Nan;
  if (magnitude >= 0x38800000u) {
    return {static_cast<std::uint16_t>(sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10)))};
  }
  // A subnormal number is a multiple of 2^-24, the last place of numbers in [0.5, 1).
  return {static_cast<std::uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
#endif
}

/// Two numbers in a word, of Bf16 or Fp16 (within the finite ones). NaN stays NaN in both types.
template <class Number>
NB_DEVICE unsigned pack_pair(float low, float high) {
  if constexpr (std::is_same_v<Number, Bf16>) {
    return to_bf16(low).bits | static_cast<unsigned>(to_bf16(high).bits) << 16;
  } else {
    return near_fp16(low).bits | static_cast<unsigned>(near_fp16(high).bits) << 16;
  }
}

/// How many numbers 16 bytes hold.
template <class Number>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(Number));

/// The signed byte i of a word: with its sign turned it is the last digits of 2^23 + 128 + code, which loses none.
NB_DEVICE float signed_byte(unsigned word, int i) {
  return bits_to_float(0x4b000000u | ((word ^ 0x80808080u) >> (8 * i) & 0xffu)) - 8388736.0f;
}

/// Number i of a vector; of codes the code.
template <class Number>
NB_DEVICE float element(const uint4& vector, int i) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
  if constexpr (kIsScaled<Number>) {
    return signed_byte(words[i / 4], i % 4);
  } else if constexpr (sizeof(Number) == 4) {
    return bits_to_float(words[i]);
  } else {
    const unsigned word = words[i / 2];
    return to_float(Number{static_cast<std::uint16_t>(i % 2 == 0 ? word : word >> 16)});
  }
}

}  // namespace nb::cuda
