// Counter-based random numbers (Philox4x32-10): a pure function of key and counter, no state.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the known-answer vectors of that
// paper are in the test. Not for cryptography. Safe to use from any thread.
#pragma once

#include <array>
#include <cstdint>

namespace nb {

/// One Philox4x32-10 block: four independent 32-bit words.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

/// A uniform number in [0, 1) with 53 random bits, determined by its three arguments alone: the user's seed, the
/// index of the choice within the request, and the position of the token being drawn.
double uniform_at(std::uint64_t seed, std::uint32_t choice, std::uint64_t position);

/// A seed from the operating system's entropy, for requests that gave none.
std::uint64_t random_seed();

}  // namespace nb
