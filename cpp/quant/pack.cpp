// The plain packing recipe of each weight format; layouts are drawn in format.cpp.
//
// Scales come from the extreme values of a block and are rounded to f16 before the codes are chosen against them. The
// K-quants round their scales once more, to the integers of the block.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/dtype.h"
#include "base/error.h"
#include "quant/format.h"

namespace nb::quant {
namespace {

void store_u16(std::uint8_t* bytes, std::uint16_t value) { std::memcpy(bytes, &value, sizeof(value)); }

// Stores a scale or minimum and returns the value that it rounds to.
float store_f16(std::uint8_t* bytes, float value) {
  const std::uint16_t bits = f32_to_f16(value);
  const float rounded = f16_to_f32(bits);
  NB_CHECK(std::isfinite(rounded), invalid_argument, "weights whose scale or minimum is ", value,
           " cannot be packed: the largest f16 is 65504");
  store_u16(bytes, bits);
  return rounded;
}

float inverse_of(float scale) { return scale != 0.0f && std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f; }

int to_code(float value, float inverse, float shift, int lowest, int highest) {
  const float code = std::nearbyint(value * inverse + shift);
  return static_cast<int>(std::clamp(code, static_cast<float>(lowest), static_cast<float>(highest)));
}

float largest_magnitude(const float* w, std::int64_t count) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(w[i]));
  return largest;
}

// The value farthest from zero, with its sign.
float extreme_of(const float* w, int count) {
  float extreme = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (std::fabs(w[i]) > std::fabs(extreme)) extreme = w[i];
  }
  return extreme;
}

// `count` codes around `zero`, 0 .. 2 * zero - 1. The extreme value gets code 0. Stores the scale.
void symmetric_codes(const float* w, int count, int zero, std::uint8_t* scale, std::uint8_t* codes) {
  const float d = store_f16(scale, extreme_of(w, count) / static_cast<float>(-zero));
  const float inverse = inverse_of(d);
  for (int i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>(to_code(w[i], inverse, static_cast<float>(zero), 0, 2 * zero - 1));
  }
}

// `count` codes 0 .. highest above the smallest value. Stores scale and minimum.
void ranged_codes(const float* w, int count, int highest, std::uint8_t* scale, std::uint8_t* minimum,
                  std::uint8_t* codes) {
  const auto [low, high] = std::minmax_element(w, w + count);
  const float d = store_f16(scale, *high / static_cast<float>(highest) - *low / static_cast<float>(highest));
  const float inverse = inverse_of(d);
  const float shift = -store_f16(minimum, *low) * inverse;
  for (int i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(to_code(w[i], inverse, shift, 0, highest));
}

// `count` signed bytes. Stores the scale.
void signed_codes(const float* w, std::int64_t count, std::uint8_t* scale, std::uint8_t* codes) {
  const float inverse = inverse_of(store_f16(scale, largest_magnitude(w, count) / 127.0f));
  for (std::int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>(to_code(w[i], inverse, 0.0f, -127, 127));
  }
}

// Low nibbles of `half` codes, then of `half` more in the high nibbles.
void store_nibbles(const std::uint8_t* codes, int half, std::uint8_t* bytes) {
  for (int i = 0; i < half; ++i) bytes[i] = static_cast<std::uint8_t>((codes[i] & 15) | (codes[i + half] & 15) << 4);
}

void store_fifth_bits(const std::uint8_t* codes, std::uint8_t* bytes) {
  std::uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<std::uint32_t>(codes[i] >> 4 & 1) << i;
  std::memcpy(bytes, &bits, sizeof(bits));
}

void pack_q4_0(const float* w, std::uint8_t* block) {
  std::uint8_t codes[32];
  symmetric_codes(w, 32, 8, block, codes);
  store_nibbles(codes, 16, block + 2);
}

void pack_q4_1(const float* w, std::uint8_t* block) {
  std::uint8_t codes[32];
  ranged_codes(w, 32, 15, block, block + 2, codes);
  store_nibbles(codes, 16, block + 4);
}

void pack_q5_0(const float* w, std::uint8_t* block) {
  std::uint8_t codes[32];
  symmetric_codes(w, 32, 16, block, codes);
  store_fifth_bits(codes, block + 2);
  store_nibbles(codes, 16, block + 6);
}

void pack_q5_1(const float* w, std::uint8_t* block) {
  std::uint8_t codes[32];
  ranged_codes(w, 32, 31, block, block + 2, codes);
  store_fifth_bits(codes, block + 4);
  store_nibbles(codes, 16, block + 8);
}

void pack_q8_0(const float* w, std::uint8_t* block) { signed_codes(w, 32, block, block + 2); }
void pack_w8(const float* w, std::uint8_t* block) { signed_codes(w, 64, block, block + 2); }

void pack_w4(const float* w, std::uint8_t* block) {
  std::uint8_t codes[64];
  ranged_codes(w, 64, 15, block, block + 2, codes);
  store_nibbles(codes, 32, block + 4);
}

// AWQ's and GPTQ's: codes 0 .. 15 around a zero point, over a range that has zero in it.
template <int kGroupSize>
void pack_zero_point(const float* w, std::uint8_t* block) {
  const auto [low, high] = std::minmax_element(w, w + kGroupSize);
  const float lowest = std::min(*low, 0.0f), highest = std::max(*high, 0.0f);
  const float inverse = inverse_of(store_f16(block, highest / 15.0f - lowest / 15.0f));
  const int zero = to_code(-lowest, inverse, 0.0f, 0, 15);
  block[2] = static_cast<std::uint8_t>(zero);
  for (int begin = 0; begin < kGroupSize; begin += 32) {
    std::uint8_t codes[32];
    for (int i = 0; i < 32; ++i) {
      codes[i] = static_cast<std::uint8_t>(to_code(w[begin + i], inverse, static_cast<float>(zero), 0, 15));
    }
    store_nibbles(codes, 16, block + 3 + begin / 2);
  }
}

// 8-bit floats below one scale.
void pack_fp8(const float* w, std::int64_t count, std::uint8_t* row) {
  const float scale = largest_magnitude(w, count) / 448.0f, inverse = inverse_of(scale);
  std::memcpy(row, &scale, sizeof(scale));
  for (std::int64_t i = 0; i < count; ++i) row[4 + i] = f32_to_e4m3(w[i] * inverse);
}

// Codes 0 .. highest of a block of 256, with the head (d, dmin, 6-bit scales and minima) that q4_k and q5_k share. A
// K-quant can only subtract, so its range begins at zero or below.
void ranged_k_codes(const float* w, int highest, std::uint8_t* block, std::uint8_t* codes) {
  float scales[8], minima[8];
  for (int g = 0; g < 8; ++g) {
    const auto [low, high] = std::minmax_element(w + 32 * g, w + 32 * g + 32);
    minima[g] = std::max(0.0f, -*low);
    scales[g] = std::max(0.0f, *high / static_cast<float>(highest) + minima[g] / static_cast<float>(highest));
  }
  const float d = store_f16(block, largest_magnitude(scales, 8) / 63.0f);
  const float dmin = store_f16(block + 2, largest_magnitude(minima, 8) / 63.0f);
  std::uint8_t* s = block + 4;
  std::memset(s, 0, 12);
  for (int g = 0; g < 8; ++g) {
    const int scale = to_code(scales[g], inverse_of(d), 0.0f, 0, 63);
    const int minimum = to_code(minima[g], inverse_of(dmin), 0.0f, 0, 63);
    if (g < 4) {
      s[g] = static_cast<std::uint8_t>(scale);
      s[g + 4] = static_cast<std::uint8_t>(minimum);
    } else {
      s[g + 4] = static_cast<std::uint8_t>((scale & 15) | (minimum & 15) << 4);
      s[g - 4] = static_cast<std::uint8_t>(s[g - 4] | scale >> 4 << 6);
      s[g] = static_cast<std::uint8_t>(s[g] | minimum >> 4 << 6);
    }
    const float inverse = inverse_of(d * static_cast<float>(scale));
    const float shift = dmin * static_cast<float>(minimum) * inverse;
    for (int i = 32 * g; i < 32 * g + 32; ++i) {
      codes[i] = static_cast<std::uint8_t>(to_code(w[i], inverse, shift, 0, highest));
    }
  }
}

void pack_q4_k(const float* w, std::uint8_t* block) {
  std::uint8_t codes[256];
  ranged_k_codes(w, 15, block, codes);
  for (int pair = 0; pair < 4; ++pair) store_nibbles(codes + 64 * pair, 32, block + 16 + 32 * pair);
}

void pack_q5_k(const float* w, std::uint8_t* block) {
  std::uint8_t codes[256];
  ranged_k_codes(w, 31, block, codes);
  for (int pair = 0; pair < 4; ++pair) store_nibbles(codes + 64 * pair, 32, block + 48 + 32 * pair);
  for (int i = 0; i < 32; ++i) {
    int bits = 0;
    for (int g = 0; g < 8; ++g) bits |= (codes[32 * g + i] >> 4) << g;
    block[16 + i] = static_cast<std::uint8_t>(bits);
  }
}

void pack_q6_k(const float* w, std::uint8_t* block) {
  float scales[16], largest = 0.0f;
  for (int sub = 0; sub < 16; ++sub) {
    scales[sub] = extreme_of(w + 16 * sub, 16) / -32.0f;
    largest = std::max(largest, std::fabs(scales[sub]));
  }
  const float d = store_f16(block + 208, largest / 127.0f);
  std::uint8_t codes[256];
  for (int sub = 0; sub < 16; ++sub) {
    const int scale = to_code(scales[sub], inverse_of(d), 0.0f, -127, 127);
    block[192 + sub] = static_cast<std::uint8_t>(scale);
    const float inverse = inverse_of(d * static_cast<float>(scale));
    for (int i = 16 * sub; i < 16 * sub + 16; ++i) {
      codes[i] = static_cast<std::uint8_t>(to_code(w[i], inverse, 32.0f, 0, 63));
    }
  }
  for (int part = 0; part < 2; ++part) {
    const std::uint8_t* c = codes + 128 * part;
    store_nibbles(c, 64, block + 64 * part);
    for (int i = 0; i < 32; ++i) {
      block[128 + 32 * part + i] =
          static_cast<std::uint8_t>(c[i] >> 4 | c[32 + i] >> 4 << 2 | c[64 + i] >> 4 << 4 | c[96 + i] >> 4 << 6);
    }
  }
}

using PackBlock = void (*)(const float*, std::uint8_t*);

PackBlock block_packer(Format format) {
  switch (format) {
    case Format::q4_0:
      return pack_q4_0;
    case Format::q4_1:
      return pack_q4_1;
    case Format::q8_0:
      return pack_q8_0;
    case Format::q5_0:
      return pack_q5_0;
    case Format::q5_1:
      return pack_q5_1;
    case Format::q4_k:
      return pack_q4_k;
    case Format::q5_k:
      return pack_q5_k;
    case Format::q6_k:
      return pack_q6_k;
    case Format::w8:
      return pack_w8;
    case Format::w4:
      return pack_w4;
    case Format::awq_int4:
    case Format::gptq_int4:
      return pack_zero_point<128>;
    case Format::awq_int4_g64:
    case Format::gptq_int4_g64:
      return pack_zero_point<64>;
    case Format::awq_int4_g32:
    case Format::gptq_int4_g32:
      return pack_zero_point<32>;
    case Format::f32:
    case Format::bf16:
    case Format::f16:
    case Format::w8_channel:
    case Format::fp8_e4m3:
      break;
  }
  return nullptr;
}

}  // namespace

void pack_row(Format format, const float* values, std::int64_t num_elements, std::uint8_t* out) {
  const FormatInfo& info = format_info(format);
  if (format == Format::f32) {
    std::memcpy(out, values, static_cast<std::size_t>(num_elements) * sizeof(float));
    return;
  }
  if (info.is_plain()) {
    for (std::int64_t i = 0; i < num_elements; ++i) {
      store_u16(out + 2 * i, format == Format::bf16 ? f32_to_bf16(values[i]) : f32_to_f16(values[i]));
    }
    return;
  }
  for (std::int64_t i = 0; i < num_elements; ++i) {
    NB_CHECK(std::isfinite(values[i]), invalid_argument, "weight ", i, " of a row is ", values[i], ", which ",
             info.name, " cannot hold");
  }
  if (format == Format::w8_channel) return signed_codes(values, num_elements, out, out + info.row_header_bytes);
  if (format == Format::fp8_e4m3) return pack_fp8(values, num_elements, out);
  const PackBlock pack_block = block_packer(format);
  for (std::int64_t i = 0; i < num_elements; i += info.block_elements, out += info.block_bytes) {
    pack_block(values + i, out);
  }
}

}  // namespace nb::quant
