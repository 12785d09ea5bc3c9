// A file (little-endian; every u64 offset counts from the start of the file):
//
//     0 | header, 128 bytes                  |
//   128 | section directory, 32 bytes each   |
//       | METADATA                           |   sections other than DATA begin at multiples of 8
//       | TENSORS                            |
//       | zeros                              |
//       | DATA: tensor, zeros, tensor, zeros |   DATA and each tensor begin at multiples of 4096; zeros after the last
//
//   header     0 magic[8] | 8 u32 version | 12 u32 flags = 0 | 16 u64 file bytes | 24 u64 offset of the directory
//             32 u32 sections | 36 u32 CRC32C of the directory | 40 fingerprint[32] | 72 zeros | 124 u32 CRC32C of
//             0..123
//   section    0 u32 kind | 4 u32 flags | 8 u64 offset | 16 u64 bytes | 24 u32 CRC32C (0 for DATA) | 28 u32 0
//   METADATA  u64 entries, then entries as in metadata_parser.h
//   TENSORS   u64 tensors, then of each
//             | string name | u32 format | u32 rank | u64 dims[rank] | u64 offset | u64 bytes | u32 CRC32C of its data
//             |
//
//   fingerprint = SHA-256(u64 bytes of METADATA, METADATA, data of each tensor in order, u64 bytes of TENSORS, TENSORS)
#include "io/braid_format.h"

#include <cstring>

#include "base/error.h"

namespace nb::io {
namespace {

struct FormatCode {
  std::uint32_t code;
  const char* name;  // as in the table of quant/format.h
};

// A number is never given to another format. Reserved ones have a name, but nothing reads or writes them yet.
constexpr FormatCode kFormatCodes[] = {
    {0, "f32"},           {1, "f16"},
    {2, "bf16"},          {3, "fp8_e4m3"},  //
    {4, "fp8_e5m2"},      {16, "q4_0"},
    {17, "q4_1"},         {18, "q5_0"},  //
    {19, "q5_1"},         {20, "q8_0"},
    {24, "q4_k"},         {25, "q5_k"},  //
    {26, "q6_k"},         {32, "w8"},
    {33, "w8_channel"},   {34, "w4"},  //
    {40, "awq_int4"},     {41, "gptq_int4"},
    {42, "awq_int4_g64"}, {43, "gptq_int4_g64"},  //
    {44, "awq_int4_g32"}, {45, "gptq_int4_g32"},
};

// Reserved: a format laid out in 16-row tiles is its number plus this.
constexpr std::uint32_t kTileCodes = 256;

const char* row_name(std::uint32_t code) {
  for (const FormatCode& row : kFormatCodes) {
    if (row.code == code) return row.name;
  }
  return nullptr;
}

}  // namespace

std::string braid_section_name(std::uint32_t kind) {
  switch (static_cast<BraidSectionKind>(kind)) {
    case BraidSectionKind::metadata:
      return "METADATA";
    case BraidSectionKind::tensors:
      return "TENSORS";
    case BraidSectionKind::data:
      return "DATA";
  }
  return "kind " + std::to_string(kind);
}

std::uint32_t braid_code(quant::Format format) {
  for (const FormatCode& row : kFormatCodes) {
    if (std::strcmp(row.name, quant::to_string(format)) == 0) return row.code;
  }
  fail(ErrorCode::internal, "weight format ", quant::to_string(format), " has no number in .braid files");
}

std::optional<quant::Format> braid_format(std::uint32_t code) {
  const char* name = row_name(code);
  for (int i = 0; name != nullptr && i < quant::kNumFormats; ++i) {
    const auto format = static_cast<quant::Format>(i);
    if (std::strcmp(name, quant::to_string(format)) == 0) return format;
  }
  return std::nullopt;
}

std::string braid_format_name(std::uint32_t code) {
  if (const char* name = row_name(code)) return name;
  if (code >= kTileCodes && row_name(code - kTileCodes) != nullptr) {
    return std::string(row_name(code - kTileCodes)) + " in 16-row tiles";
  }
  return "format " + std::to_string(code);
}

}  // namespace nb::io
