// Block layouts (little-endian; d and m are f16; 32 weights w0..w31 per block):
//
//   q4_0  18 bytes  | d | b0 .. b15 |      low nibble of bi = code of wi, high nibble = code of w(i+16);  w =
//   d*(code-8) q4_1  20 bytes  | d | m | b0 .. b15 |  same nibbles;                                                  w
//   = d*code + m q8_0  34 bytes  | d | c0 .. c31 |      signed bytes; w = d*code
#include "quant/format.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/dtype.h"
#include "base/error.h"

namespace nb::quant {
namespace {

std::uint16_t load_u16(const std::uint8_t* bytes) {
  std::uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

void store_u16(std::uint8_t* bytes, std::uint16_t value) { std::memcpy(bytes, &value, sizeof(value)); }

void unpack_f32(const std::uint8_t* block, float* out) { std::memcpy(out, block, sizeof(float)); }
void unpack_bf16(const std::uint8_t* block, float* out) { *out = bf16_to_f32(load_u16(block)); }
void unpack_f16(const std::uint8_t* block, float* out) { *out = f16_to_f32(load_u16(block)); }

void unpack_q4_0(const std::uint8_t* block, float* out) {
  const float d = f16_to_f32(load_u16(block));
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((block[2 + i] & 15) - 8);
    out[i + 16] = d * static_cast<float>((block[2 + i] >> 4) - 8);
  }
}

void unpack_q4_1(const std::uint8_t* block, float* out) {
  const float d = f16_to_f32(load_u16(block));
  const float m = f16_to_f32(load_u16(block + 2));
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(block[4 + i] & 15) + m;
    out[i + 16] = d * static_cast<float>(block[4 + i] >> 4) + m;
  }
}

void unpack_q8_0(const std::uint8_t* block, float* out) {
  const float d = f16_to_f32(load_u16(block));
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<std::int8_t>(block[2 + i]));
}

int to_code(float value, float inverse, float shift, int lowest, int highest) {
  return std::clamp(static_cast<int>(std::nearbyint(value * inverse + shift)), lowest, highest);
}

void pack_q4_0(const float* w, std::uint8_t* block) {
  float extreme = 0.0f;
  for (int i = 0; i < 32; ++i) {
    if (std::fabs(w[i]) > std::fabs(extreme)) extreme = w[i];
  }
  const std::uint16_t d = f32_to_f16(extreme / -8.0f);
  const float inverse = f16_to_f32(d) != 0.0f ? 1.0f / f16_to_f32(d) : 0.0f;
  store_u16(block, d);
  for (int i = 0; i < 16; ++i) {
    const int low = to_code(w[i], inverse, 8.0f, 0, 15);
    const int high = to_code(w[i + 16], inverse, 8.0f, 0, 15);
    block[2 + i] = static_cast<std::uint8_t>(low | high << 4);
  }
}

void pack_q4_1(const float* w, std::uint8_t* block) {
  const auto [lowest, highest] = std::minmax_element(w, w + 32);
  const std::uint16_t d = f32_to_f16((*highest - *lowest) / 15.0f);
  const std::uint16_t m = f32_to_f16(*lowest);
  const float inverse = f16_to_f32(d) != 0.0f ? 1.0f / f16_to_f32(d) : 0.0f;
  const float shift = -f16_to_f32(m) * inverse;
  store_u16(block, d);
  store_u16(block + 2, m);
  for (int i = 0; i < 16; ++i) {
    const int low = to_code(w[i], inverse, shift, 0, 15);
    const int high = to_code(w[i + 16], inverse, shift, 0, 15);
    block[4 + i] = static_cast<std::uint8_t>(low | high << 4);
  }
}

void pack_q8_0(const float* w, std::uint8_t* block) {
  float largest = 0.0f;
  for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(w[i]));
  const std::uint16_t d = f32_to_f16(largest / 127.0f);
  const float inverse = f16_to_f32(d) != 0.0f ? 1.0f / f16_to_f32(d) : 0.0f;
  store_u16(block, d);
  for (int i = 0; i < 32; ++i) block[2 + i] = static_cast<std::uint8_t>(to_code(w[i], inverse, 0.0f, -127, 127));
}

constexpr FormatInfo kFormats[kNumFormats] = {
    {Format::f32, "f32", 1, 4, 2048, false, unpack_f32},    {Format::bf16, "bf16", 1, 2, 1024, false, unpack_bf16},
    {Format::f16, "f16", 1, 2, 1024, false, unpack_f16},    {Format::q4_0, "q4_0", 32, 18, 288, true, unpack_q4_0},
    {Format::q4_1, "q4_1", 32, 20, 320, true, unpack_q4_1}, {Format::q8_0, "q8_0", 32, 34, 544, true, unpack_q8_0},
};

}  // namespace

const FormatInfo& format_info(Format format) { return kFormats[static_cast<std::size_t>(format)]; }

Format parse_format(const std::string& name) {
  for (const FormatInfo& info : kFormats) {
    if (name == info.name) return info.format;
  }
  fail(ErrorCode::unsupported, "unknown weight format '", name, "'");
}

std::int64_t row_bytes(Format format, std::int64_t num_elements) {
  const FormatInfo& info = format_info(format);
  NB_CHECK(num_elements % info.block_elements == 0, invalid_argument, "a row of ", num_elements,
           " weights does not fill ", info.name, " blocks of ", info.block_elements);
  return num_elements / info.block_elements * info.block_bytes;
}

void unpack_row(Format format, const std::uint8_t* row, std::int64_t num_elements, float* out) {
  const FormatInfo& info = format_info(format);
  for (std::int64_t i = 0; i < num_elements; i += info.block_elements, row += info.block_bytes) {
    info.unpack_block(row, out + i);
  }
}

void pack_row(Format format, const float* values, std::int64_t num_elements, std::uint8_t* out) {
  const FormatInfo& info = format_info(format);
  for (std::int64_t i = 0; i < num_elements; i += info.block_elements, out += info.block_bytes) {
    switch (format) {
      case Format::f32:
        std::memcpy(out, values + i, sizeof(float));
        break;
      case Format::bf16:
        store_u16(out, f32_to_bf16(values[i]));
        break;
      case Format::f16:
        store_u16(out, f32_to_f16(values[i]));
        break;
      case Format::q4_0:
        pack_q4_0(values + i, out);
        break;
      case Format::q4_1:
        pack_q4_1(values + i, out);
        break;
      case Format::q8_0:
        pack_q8_0(values + i, out);
        break;
    }
  }
}

}  // namespace nb::quant
