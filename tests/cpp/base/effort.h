// How much tests of many cases do where sanitizers or an emulated processor make each case several times slower.
//
// For tests only. Release runs every case, but for a few tests that take very long; what sanitizers look for (memory,
// undefined behaviour) is in the same code for the next size or seed of a case, and a share of the cases reaches it. So
// do mistakes of kernels for another processor (NANOBRAID_TEST_EMULATED). With NANOBRAID_TEST_FULL all run.
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

/// Whether every case runs, wherever.
inline bool is_full() { return std::getenv("NANOBRAID_TEST_FULL") != nullptr; }

/// Whether tests run a share of their cases: under a sanitizer and on an emulated processor, but not in the full run.
inline bool is_reduced() { return (is_sanitized() || std::getenv("NANOBRAID_TEST_EMULATED") != nullptr) && !is_full(); }

/// From one number or seed of a case to the next: 1, or `stride` where tests are reduced.
inline unsigned step_of(unsigned stride) { return is_reduced() ? stride : 1; }

/// Every `stride`-th case, the first among them. A stride that divides the number of a setting's values leaves some
/// out.
template <class Case>
std::vector<Case> every(std::size_t stride, const std::vector<Case>& cases) {
  std::vector<Case> some;
  for (std::size_t i = 0; i < cases.size(); i += stride) some.push_back(cases[i]);
  return some;
}

/// The cases to run: all, or, where tests are reduced, every `stride`-th of them.
template <class Case>
std::vector<Case> some_of(const std::vector<Case>& cases, std::size_t stride) {
  return every(step_of(static_cast<unsigned>(stride)), cases);
}

/// The cases to run of a test that takes very long in Release, too: all in the full run only, else every `stride`-th,
/// and where tests are reduced every `reduced`-th.
template <class Case>
std::vector<Case> few_of(const std::vector<Case>& cases, std::size_t stride, std::size_t reduced) {
  return every(is_full() ? 1 : is_reduced() ? reduced : stride, cases);
}

}  // namespace nb
