// How much tests of many cases do where sanitizers make each case several times slower.
//
// For tests only. Release runs every case; what sanitizers look for (memory, undefined behaviour) is in the same code
// for the next size or seed of a case, and a share of the cases reaches it. With NANOBRAID_TEST_FULL all run.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <vector>

namespace nb {

/// Whether tests run a share of their cases: under a sanitizer, but not in the full run.
inline bool is_reduced() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return std::getenv("NANOBRAID_TEST_FULL") == nullptr;
#else
  return false;
#endif
}

/// The cases to run: all, or, where tests are reduced, every `stride`-th of them, the first among them.
template <class Case>
std::vector<Case> some_of(const std::vector<Case>& cases, std::size_t stride) {
  std::vector<Case> some;
  for (std::size_t i = 0; i < cases.size(); i += is_reduced() ? stride : 1) some.push_back(cases[i]);
  return some;
}

}  // namespace nb
