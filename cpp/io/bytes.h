// Reading values out of raw bytes, whatever their alignment.
//
// Not for bounds: the caller has checked them. Safe from any thread.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>

namespace nb::io {

/// The value of a trivially copyable T at `at`.
template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

inline std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace nb::io
