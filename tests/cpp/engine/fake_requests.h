// Requests and sequences for tests that run no model.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "engine/sequence.h"

namespace nb::engine {

/// A greedy request with prompt 1, 2, ..., num_prompt.
inline Request make_request(int num_prompt, int max_tokens) {
  Request request;
  for (int i = 0; i < num_prompt; ++i) request.prompt.push_back(i + 1);
  request.sampling.temperature = 0.0;
  request.max_tokens = max_tokens;
  return request;
}

inline std::unique_ptr<Sequence> make_sequence(RequestId id, Request request, std::vector<TokenId> eos_ids = {},
                                               int max_model_len = 1000) {
  return std::make_unique<Sequence>(id, std::move(request), eos_ids, max_model_len);
}

inline std::unique_ptr<Sequence> make_sequence(RequestId id, int num_prompt, int max_tokens) {
  return make_sequence(id, make_request(num_prompt, max_tokens));
}

}  // namespace nb::engine
