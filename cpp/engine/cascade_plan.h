// Finds what the sequences of a step have in common at their beginning, so that attention reads it once for all.
//
// Integers only: sequences share a prefix where their lists of blocks begin alike, which the prefix cache, forks and
// chunks have seen to. Not for deciding who computes what (scheduler.h), and without influence on any result: it orders
// segments and says which keys neighbours share. Used by the thread that runs steps.
#pragma once

#include <cstdint>

#include "model/step_inputs.h"

namespace nb::engine {

/// Fewer keys in common are not worth joining two neighbours: one tile of keys of the CPU kernels.
inline constexpr int kMinSharedKeys = 64;

/// Nor are they when either has more than so many times as many keys to itself. Rows of one sequence read its KV heads
/// one soon after the other; joined rows come back to them later, which costs up to a tenth of the time for keys of
/// their own where these come from memory. Measured, that is as much as joining saves at about four times as many
/// (eval/kernels/cascade_bench.cpp).
inline constexpr int kMaxOwnRatio = 2;

/// Orders `inputs.segments` so that those which share leading blocks stand together, longest common prefix next to
/// each other (the depth-first order of the trie of their blocks, run after run), and sets `shared_runs` and
/// `shared_keys` of each to what it has in common with the one before it, or 0 if that is not worth it. Chunks are
/// common wherever they stand in either prompt and whatever is hidden of them; runs with positions of their own are
/// not. If it is worth it nowhere, the order stays. `window` is the model's sliding window, 0 for none. No segment may
/// share anything yet. Returns the keys that need not be read again: for each segment what it shares with the one
/// before it, as far as its first row sees it. O(S log S) comparisons of lists; allocates nothing.
std::int64_t plan_cascade(model::StepInputs& inputs, int window);

}  // namespace nb::engine
