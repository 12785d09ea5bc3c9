#include "sampling/sampler.h"

#include "base/error.h"
#include "base/rng.h"
#include "sampling/stages.h"

namespace nb::sampling {

TokenId Sampler::sample(const SampleInput& input) {
  NB_ASSERT(input.num_prompt <= input.tokens.size());
  const StageInput stage_input{input.params, input.tokens, input.num_prompt, input.stop_ids, input.allowed_bits};
  const auto run_stages = [&](bool edits) {
    for (const Stage& stage : stages()) {
      if (stage.edits == edits && stage.active(stage_input)) stage.apply(candidates_, stage_input);
    }
  };
  candidates_.reset(input.logits);
  run_stages(true);
  candidates_.settle();
  if (input.params.temperature == 0.0) return candidates_.best();
  run_stages(false);
  return candidates_.draw(uniform_at(input.seed, input.params.choice_index, input.tokens.size()));
}

}  // namespace nb::sampling
