// Fuzz target: any bytes are a safetensors file. What is listed lies inside the file, without holes and overlaps.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  static const std::string path = "fuzz";
  try {
    std::uint64_t covered = 0;
    for (const nb::io::SafetensorsTensor& tensor : nb::io::parse_safetensors(bytes, size, path)) {
      require(tensor.offset <= size && tensor.bytes <= size - tensor.offset);
      covered += tensor.bytes;
    }
    require(covered <= size);
  } catch (const nb::Error& error) {
    require(error.code() == nb::ErrorCode::format);
  }
  try {  // the same bytes as JSON alone: headers rarely get far
    nb::io::JsonCursor json(std::string_view(reinterpret_cast<const char*>(data), size), path);
    json.skip_value();
    json.finish();
  } catch (const nb::Error& error) {
    require(error.code() == nb::ErrorCode::format);
  }
  return 0;
}
