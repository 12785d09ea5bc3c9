// Integer rounding used by layouts, arenas and file formats.
//
// Not for pointers of unknown provenance. Safe to use from any thread.
#pragma once

#include <cstdint>

namespace nb {

/// The smallest multiple of `multiple` that is >= `value`; `multiple` > 0.
template <class T>
constexpr T round_up(T value, T multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// `value / divisor` rounded up; `divisor` > 0, `value` >= 0.
template <class T>
constexpr T ceil_div(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace nb
