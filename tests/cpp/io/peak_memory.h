// How much memory a function takes at its peak, by the operator new of gguf_parser_test.cpp.
//
// For io_tests only, one thread at a time. Not for memory that is mapped.
#pragma once

#include <atomic>
#include <cstddef>

namespace nb::io::test {

extern std::atomic<std::size_t> live_bytes;
extern std::atomic<std::size_t> peak_bytes;

// Bytes allocated at the most while `function` ran.
template <class Function>
std::size_t peak_of(const Function& function) {
  const std::size_t before = live_bytes;
  peak_bytes = before;
  function();
  return peak_bytes - before;
}

}  // namespace nb::io::test
