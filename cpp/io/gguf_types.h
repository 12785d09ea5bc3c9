// The tensor types of the GGUF format with their block sizes.
//
// Lists every type that ggml writes, so that any file can be inspected; which of them the engine runs is said in
// gguf_format.h. Value types of metadata are in metadata.h. Safe from any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace nb::io {

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
