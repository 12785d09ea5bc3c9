#include "sampling/sampler.h"

#include "base/rng.h"

namespace nb::sampling {

TokenId Sampler::sample(const SampleInput& input) {
  const bool greedy = input.params.temperature == 0.0;
  const StageInput stage_input{input.params, input.tokens};
  candidates_.reset(input.logits);
  for (const Stage& stage : stages()) {
    if (greedy && !stage.shapes_greedy) continue;
    if (stage.active(input.params)) stage.apply(candidates_, stage_input);
  }
  if (greedy) return pick_greedy(candidates_);
  return draw(candidates_, uniform_at(input.seed, input.params.choice_index, input.tokens.size()));
}

}  // namespace nb::sampling
