// Options of speculation, as Python gives them.
#include "engine/speculative.h"

#include "bindings.h"

namespace nb::bindings {

engine::SpeculativeOptions parse_speculative(const SpeculativeOption& option, const model::Model* draft_model) {
  const auto& [method, num_draft_tokens, prompt_lookup_min, prompt_lookup_max, adaptive] = option;
  return {.method = engine::parse_speculative_method(method),
          .num_draft_tokens = num_draft_tokens,
          .prompt_lookup_min = prompt_lookup_min,
          .prompt_lookup_max = prompt_lookup_max,
          .adaptive = adaptive,
          .draft_model = draft_model};
}

}  // namespace nb::bindings
