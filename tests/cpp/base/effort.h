// How much tests of many cases do where sanitizers make each case several times slower.
//
// For tests only. Release runs every case; what sanitizers look for (memory, undefined behaviour) is in the same code
// for the next size or seed of a case, and a share of the cases reaches it. With NANOBRAID_TEST_FULL all run.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <vector>

// There when a program is linked with a sanitizer.
extern "C" {
[[gnu::weak]] void __asan_init();
[[gnu::weak]] void __tsan_init();
}

namespace nb {

/// Asked of the program, since the tests may have been compiled without the sanitizer of what they test. Such builds
/// are Debug, where an engine checks its invariants after every step by itself.
inline bool is_sanitized() { return &__asan_init != nullptr || &__tsan_init != nullptr; }

/// Whether tests run a share of their cases: under a sanitizer, but not in the full run.
inline bool is_reduced() { return is_sanitized() && std::getenv("NANOBRAID_TEST_FULL") == nullptr; }

/// From one number or seed of a case to the next: 1, or `stride` where tests are reduced.
inline unsigned step_of(unsigned stride) { return is_reduced() ? stride : 1; }

/// The cases to run: all, or, where tests are reduced, every `stride`-th of them, the first among them.
template <class Case>
std::vector<Case> some_of(const std::vector<Case>& cases, std::size_t stride) {
  std::vector<Case> some;
  for (std::size_t i = 0; i < cases.size(); i += step_of(static_cast<unsigned>(stride))) some.push_back(cases[i]);
  return some;
}

}  // namespace nb
