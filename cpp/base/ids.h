// Integer types that name things across layers, and the one size everybody must agree on.
//
// Not for anything with behaviour. Safe to use from any thread.
#pragma once

#include <stdint.h>

namespace nb {

using TokenId = int32_t;     ///< index into a vocabulary, 0-based
using BlockId = int32_t;     ///< index of a KV block in its pool; kNoBlock means none
using RequestId = uint64_t;  ///< assigned by the engine, never reused

inline constexpr BlockId kNoBlock = -1;
inline constexpr int kBlockTokens = 16;   ///< tokens of one KV block
inline constexpr int kSplitTokens = 256;  ///< attention cuts its runs at multiples of this many positions

}  // namespace nb
