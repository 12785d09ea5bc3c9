// What a request may ask about its own prompt: log probabilities of its tokens, logits of its positions, kept or
// observed.
//
// Not for generated tokens. Memory is reserved at submit, so that a step never fails for lack of it. store() is called
// from the model's threads, each position once.
#pragma once

#include <span>

#include "engine/sequence.h"
#include "sampling/sampler.h"

namespace nb::engine {

/// Reserves what the request asked for. Throws out_of_memory naming the shape if the machine does not have it.
void reserve_prompt_scores(Sequence& sequence, int vocab_size);

/// Whether the logits at `position` are asked for: all of the prompt's, all but the last, or those observed.
bool wants_prompt_score(const Sequence& sequence, int position);

/// Keeps or shows what is asked for of the logits (f32[V]) at `position`: the row itself, and how likely the token at
/// position + 1 and the most likely ones were. The sampler lends its scratch memory.
void store_prompt_score(Sequence& sequence, int position, std::span<const float> logits, sampling::Sampler& sampler);

}  // namespace nb::engine
