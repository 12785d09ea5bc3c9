#include "engine/prompt_scores.h"

#include <cstring>
#include <memory>
#include <new>

#include "base/error.h"
#include "base/memory_info.h"

namespace nb::engine {

namespace {

/// Uninitialised f32[num_rows, vocab_size]; pages become resident as rows are stored.
Buffer allocate_logits(std::int64_t num_rows, std::int64_t vocab_size) {
  const std::int64_t bytes = num_rows * vocab_size * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t available = memory_info().available_bytes;
  float* memory = nullptr;
  if (available == 0 || bytes <= available) {
    memory = new (std::nothrow) float[static_cast<std::size_t>(num_rows * vocab_size)];
  }
  NB_CHECK(memory != nullptr, out_of_memory, "prompt_logits f32[", num_rows, ", ", vocab_size, "] takes ", bytes,
           " bytes, ", available, " are available");
  return {reinterpret_cast<std::byte*>(memory), static_cast<std::size_t>(bytes), std::shared_ptr<float[]>(memory)};
}

}  // namespace

void reserve_prompt_scores(Sequence& sequence, int vocab_size) {
  const Request& request = sequence.request;
  if (request.prompt_logprobs) {
    sequence.prompt_logprobs.resize((static_cast<std::size_t>(sequence.num_prompt) - 1) *
                                    (1 + static_cast<std::size_t>(*request.prompt_logprobs)));
  }
  if (request.prompt_logits) {
    sequence.prompt_logits = allocate_logits(sequence.num_prompt - sequence.first_logits(), vocab_size);
  }
}

bool wants_prompt_score(const Sequence& sequence, int position) {
  const LogitsObserver& observer = sequence.request.observer;
  if (observer.see && position >= observer.first && position < sequence.num_prompt) return true;
  if (sequence.request.prompt_logits) return position >= sequence.first_logits() && position < sequence.num_prompt;
  return sequence.request.prompt_logprobs.has_value() && position < sequence.num_prompt - 1;
}

void store_prompt_score(Sequence& sequence, int position, std::span<const float> logits, sampling::Sampler& sampler) {
  const std::size_t index = static_cast<std::size_t>(position);
  const LogitsObserver& observer = sequence.request.observer;
  if (observer.see && position >= observer.first) observer.see(position, logits);
  if (sequence.request.prompt_logits) {
    const std::size_t row = index - static_cast<std::size_t>(sequence.first_logits());
    std::memcpy(sequence.prompt_logits.as<float>() + row * logits.size(), logits.data(), logits.size_bytes());
  }
  if (sequence.request.prompt_logprobs && position + 1 < sequence.num_prompt) {
    const TokenId next = sequence.tokens[index + 1];
    const std::size_t stride = 1 + static_cast<std::size_t>(*sequence.request.prompt_logprobs);
    sampler.score(logits, next, std::span(sequence.prompt_logprobs).subspan(index * stride, stride));
  }
}

}  // namespace nb::engine
