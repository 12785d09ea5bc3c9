// Row layouts (little-endian; d, m, dmin are f16; w0, w1, .. are the weights of one block, c their codes).
//
// Blocks of 32:
//   q4_0  18 bytes  | d | b0 .. b15 |                low nibble of bi = c(i), high nibble = c(i+16);  w = d*(c-8)
//   q4_1  20 bytes  | d | m | b0 .. b15 |            same nibbles;                                    w = d*c + m
//   q5_0  22 bytes  | d | h (u32) | b0 .. b15 |      same nibbles, bit 4 of c(i) = bit i of h;        w = d*(c-16)
//   q5_1  24 bytes  | d | m | h (u32) | b0 .. b15 |  same codes;                                      w = d*c + m
//   q8_0  34 bytes  | d | c0 .. c31 |                signed bytes;                                    w = d*c
// Blocks of 64 (ours):
//   w8    66 bytes  | d | c0 .. c63 |                signed bytes;                                    w = d*c
//   w4    36 bytes  | d | m | b0 .. b31 |            low nibble of bi = c(i), high nibble = c(i+32);  w = d*c + m
// Whole row of n (ours):
//   w8_channel      | d | c0 .. c(n-1) |             signed bytes;                                    w = d*c
// Checkpoints of AWQ and GPTQ, blocks of g = 128, 64 (_g64) or 32 (_g32), p = 0 .. g/32 - 1:
//   awq_int4   67, 35, 19 bytes  | d | z (u8) | b0 .. b(g/2-1) |          low nibble of b(16p+i) = c(32p+i), high
//   gptq_int4                    nibble = c(32p+i+16), i < 16;            w = (c-z)*d
// Whole row of n, checkpoints in 8-bit floats:
//   fp8_e4m3        | d (f32) | c0 .. c(n-1) |       E4M3, see base/dtype.h;                          w = c*d
// Blocks of 256, g = 0..7 the groups of 32 (GGML's K-quants):
//   q4_k 144 bytes  | d | dmin | s (12 bytes) | b0 .. b127 |
//                   byte 32*(g/2) + i holds c(32g+i), low nibble if g is even;  w = (d*S(g))*c - dmin*M(g)
//                   S(g), M(g) are 6 bits: for g < 4 the low bits of s[g] and of s[g+4]; for g >= 4 the low and the
//                   high nibble of s[g+4], with the top two bits of s[g-4] and of s[g] above them
//   q5_k 176 bytes  | d | dmin | s (12 bytes) | h0 .. h31 | b0 .. b127 |   as q4_k, bit 4 of c(32g+i) = bit g of h(i)
//   q6_k 210 bytes  | b0 .. b127 | h0 .. h63 | s0 .. s15 (i8) | d |    with g = 4*a + r:
//                   low 4 bits of c(32g+i) in byte 64*a + 32*(r%2) + i, low nibble if r < 2; high 2 bits at bit 2*r
//                   of h(32*a + i);  w = (d*s(k/16))*(c-32) for the weight k of the block
#include "quant/format.h"

#include <algorithm>
#include <cstring>

#include "base/dtype.h"
#include "base/error.h"
#include "quant/tile_shape.h"

namespace nb::quant {
namespace {

std::uint16_t load_u16(const std::uint8_t* bytes) {
  std::uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

float load_f16(const std::uint8_t* bytes) { return f16_to_f32(load_u16(bytes)); }

void set_scale(CodeGroup& out, float scale, float minimum = 0.0f) {
  out.scales[0] = out.scales[1] = scale;
  out.minimum = minimum;
}

// Nibbles of 16 bytes: the low ones are the first 16 codes.
void read_nibbles(const std::uint8_t* bytes, CodeGroup& out) {
  for (int i = 0; i < 16; ++i) {
    out.codes[i] = bytes[i] & 15;
    out.codes[i + 16] = bytes[i] >> 4;
  }
}

void add_fifth_bits(const std::uint8_t* bytes, CodeGroup& out) {
  for (int i = 0; i < kGroupCols; ++i) {
    out.codes[i] = static_cast<std::uint8_t>(out.codes[i] | (bytes[i / 8] >> i % 8 & 1) << 4);
  }
}

// The low or the high nibbles of 32 bytes.
void read_half_bytes(const std::uint8_t* bytes, bool high, CodeGroup& out) {
  for (int i = 0; i < kGroupCols; ++i) out.codes[i] = high ? bytes[i] >> 4 : bytes[i] & 15;
}

// Signed bytes become codes around 128.
void read_signed(const std::uint8_t* bytes, CodeGroup& out) {
  for (int i = 0; i < kGroupCols; ++i) out.codes[i] = bytes[i] ^ 0x80u;
}

void read_q4_0(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group * 18;
  set_scale(out, load_f16(block));
  read_nibbles(block + 2, out);
}

void read_q4_1(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group * 20;
  set_scale(out, load_f16(block), load_f16(block + 2));
  read_nibbles(block + 4, out);
}

void read_q8_0(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group * 34;
  set_scale(out, load_f16(block));
  read_signed(block + 2, out);
}

void read_q5_0(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group * 22;
  set_scale(out, load_f16(block));
  read_nibbles(block + 6, out);
  add_fifth_bits(block + 2, out);
}

void read_q5_1(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group * 24;
  set_scale(out, load_f16(block), load_f16(block + 2));
  read_nibbles(block + 8, out);
  add_fifth_bits(block + 4, out);
}

struct KScale {
  int scale, minimum;  // 0 .. 63
};

// Scale and minimum of group g (0 .. 7), 6 bits each, of the head of a q4_k or q5_k block.
KScale k_scale(const std::uint8_t* block, int g) {
  const std::uint8_t* s = block + 4;
  if (g < 4) return {s[g] & 63, s[g + 4] & 63};
  return {(s[g + 4] & 15) | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4};
}

void read_k_scale(const std::uint8_t* block, int g, CodeGroup& out) {
  const KScale k = k_scale(block, g);
  set_scale(out, load_f16(block) * static_cast<float>(k.scale), -(load_f16(block + 2) * static_cast<float>(k.minimum)));
}

void read_q4_k(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group / 8 * 144;
  const int g = static_cast<int>(group % 8);
  read_k_scale(block, g, out);
  read_half_bytes(block + 16 + g / 2 * 32, g % 2 == 1, out);
}

void read_q5_k(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group / 8 * 176;
  const int g = static_cast<int>(group % 8);
  read_k_scale(block, g, out);
  read_half_bytes(block + 48 + g / 2 * 32, g % 2 == 1, out);
  for (int i = 0; i < kGroupCols; ++i) {
    out.codes[i] = static_cast<std::uint8_t>(out.codes[i] | (block[16 + i] >> g & 1) << 4);
  }
}

void read_q6_k(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group / 8 * 210;
  const int g = static_cast<int>(group % 8);
  const float d = load_f16(block + 208);
  for (int half = 0; half < 2; ++half) {
    out.scales[half] = d * static_cast<float>(static_cast<std::int8_t>(block[192 + 2 * g + half]));
  }
  out.minimum = 0.0f;
  read_half_bytes(block + g / 4 * 64 + g % 2 * 32, g % 4 >= 2, out);
  const std::uint8_t* high = block + 128 + g / 4 * 32;
  for (int i = 0; i < kGroupCols; ++i) {
    out.codes[i] = static_cast<std::uint8_t>(out.codes[i] | (high[i] >> g % 4 * 2 & 3) << 4);
  }
}

void read_w8(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group / 2 * 66;
  set_scale(out, load_f16(block));
  read_signed(block + 2 + group % 2 * kGroupCols, out);
}

void read_w8_channel(const std::uint8_t* row, std::int64_t group, int count, CodeGroup& out) {
  set_scale(out, load_f16(row));
  std::uint8_t bytes[kGroupCols] = {};
  std::memcpy(bytes, row + 2 + group * kGroupCols, static_cast<std::size_t>(count));
  read_signed(bytes, out);
}

void read_w4(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  const std::uint8_t* block = row + group / 2 * 36;
  set_scale(out, load_f16(block), load_f16(block + 2));
  read_half_bytes(block + 4, group % 2 == 1, out);
}

// AWQ's and GPTQ's, blocks of kGroupSize.
template <int kGroupSize>
void read_zero_point(const std::uint8_t* row, std::int64_t group, int, CodeGroup& out) {
  constexpr int kPieces = kGroupSize / kGroupCols;
  const std::uint8_t* block = row + group / kPieces * (3 + kGroupSize / 2);
  set_scale(out, load_f16(block));
  out.zero = block[2];
  read_nibbles(block + 3 + group % kPieces * 16, out);
}

using ReadGroup = void (*)(const std::uint8_t*, std::int64_t, int, CodeGroup&);

constexpr FormatInfo row_of(Format format, const char* name, int block_elements, int block_bytes, int row_header_bytes,
                            ReadGroup read_group) {
  const TileShape shape = tile_shape(format);
  return {format,          name,      block_elements, block_bytes, row_header_bytes, shape.zero, shape.has_minimum,
          shape.has_zeros, read_group};
}

constexpr FormatInfo kFormats[kNumFormats] = {
    row_of(Format::f32, "f32", 1, 4, 0, nullptr),
    row_of(Format::bf16, "bf16", 1, 2, 0, nullptr),
    row_of(Format::f16, "f16", 1, 2, 0, nullptr),
    row_of(Format::q4_0, "q4_0", 32, 18, 0, read_q4_0),
    row_of(Format::q4_1, "q4_1", 32, 20, 0, read_q4_1),
    row_of(Format::q8_0, "q8_0", 32, 34, 0, read_q8_0),
    row_of(Format::q5_0, "q5_0", 32, 22, 0, read_q5_0),
    row_of(Format::q5_1, "q5_1", 32, 24, 0, read_q5_1),
    row_of(Format::q4_k, "q4_k", 256, 144, 0, read_q4_k),
    row_of(Format::q5_k, "q5_k", 256, 176, 0, read_q5_k),
    row_of(Format::q6_k, "q6_k", 256, 210, 0, read_q6_k),
    row_of(Format::w8, "w8", 64, 66, 0, read_w8),
    row_of(Format::w8_channel, "w8_channel", 1, 1, 2, read_w8_channel),
    row_of(Format::w4, "w4", 64, 36, 0, read_w4),
    row_of(Format::awq_int4, "awq_int4", 128, 67, 0, read_zero_point<128>),
    row_of(Format::awq_int4_g64, "awq_int4_g64", 64, 35, 0, read_zero_point<64>),
    row_of(Format::awq_int4_g32, "awq_int4_g32", 32, 19, 0, read_zero_point<32>),
    row_of(Format::gptq_int4, "gptq_int4", 128, 67, 0, read_zero_point<128>),
    row_of(Format::gptq_int4_g64, "gptq_int4_g64", 64, 35, 0, read_zero_point<64>),
    row_of(Format::gptq_int4_g32, "gptq_int4_g32", 32, 19, 0, read_zero_point<32>),
    row_of(Format::fp8_e4m3, "fp8_e4m3", 1, 1, 4, nullptr),
};

void unpack_unquantized(Format format, const std::uint8_t* row, std::int64_t num_elements, float* out) {
  if (format == Format::f32) {
    std::memcpy(out, row, static_cast<std::size_t>(num_elements) * sizeof(float));
    return;
  }
  if (format == Format::fp8_e4m3) {
    float scale;
    std::memcpy(&scale, row, sizeof(scale));
    for (std::int64_t i = 0; i < num_elements; ++i) out[i] = e4m3_to_f32(row[4 + i]) * scale;
    return;
  }
  for (std::int64_t i = 0; i < num_elements; ++i) {
    const std::uint16_t bits = load_u16(row + 2 * i);
    out[i] = format == Format::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  }
}

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
  return info.row_header_bytes + num_elements / info.block_elements * info.block_bytes;
}

void unpack_row(Format format, const std::uint8_t* row, std::int64_t num_elements, float* out) {
  const FormatInfo& info = format_info(format);
  if (!info.is_quantized()) return unpack_unquantized(format, row, num_elements, out);
  CodeGroup group;
  for (std::int64_t begin = 0; begin < num_elements; begin += kGroupCols) {
    const int count = static_cast<int>(std::min<std::int64_t>(kGroupCols, num_elements - begin));
    info.read_group(row, begin / kGroupCols, count, group);
    for (int i = 0; i < count; ++i) {
      const float value = group.scales[i / 16] * static_cast<float>(group.codes[i] - info.zero_of(group));
      out[begin + i] = info.has_minimum ? value + group.minimum : value;
    }
  }
}

}  // namespace nb::quant
