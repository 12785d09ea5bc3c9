// The two type tables of the GGUF format: value types of metadata, and tensor types with their block sizes.
//
// Lists every tensor type that ggml writes, so that any file can be inspected; which of them the engine runs is said in
// gguf_format.h. Safe from any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace nb::io {

/// Value types as numbered in the format.
enum class GgufType : std::uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};

/// "u32", "string", ...
const char* to_string(GgufType type);

/// Bytes of one value in the file; 0 for string and array, whose size varies, and for numbers that name no type.
std::uint32_t gguf_type_bytes(GgufType type);

/// Block size and bytes of a tensor type.
struct GgufTensorType {
  const char* name;  ///< as ggml spells it, e.g. "Q4_K"
  std::uint32_t block_elements;
  std::uint32_t block_bytes;
};

/// The row of a tensor type, or nothing if the number is unknown.
std::optional<GgufTensorType> gguf_tensor_type(std::uint32_t type);

/// "Q4_K", or "type N" for an unknown number.
std::string gguf_tensor_type_name(std::uint32_t type);

}  // namespace nb::io
