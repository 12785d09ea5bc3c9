#include "engine/head_runner.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "engine/prompt_scores.h"
#include "tensor/device_memory.h"

namespace nb::engine {

/// Up to kGroupRows logit rows between the head and the sampler.
struct HeadRunner::Group {
  std::span<const LogitUse> uses;
  std::span<const TokenId> argmax;
  Tensor logits;  ///< f32[uses, V], or empty where every row is plain greedy
  const StepPlan& plan;
  std::span<TokenId> sampled;
};

namespace {

/// Whether the argmax that the head has found is the token.
bool takes_argmax(const Sequence& sequence) {
  return sequence.constraint == nullptr &&
         sampling::is_plain_greedy(sequence.request.sampling, sequence.num_generated());
}

bool needs_logits(const LogitUse& use, const StepPlan& plan) {
  const Sequence& sequence = *plan.entries[static_cast<std::size_t>(use.entry)].sequence;
  return use.scores || (use.samples && (sequence.request.sampling.logprobs || !takes_argmax(sequence)));
}

/// Fills `bits` with the tokens that may come next: those of the constraint, and where it says that the answer may end,
/// and only there, those that end the sequence.
void fill_allowed(const Sequence& sequence, std::span<std::uint32_t> bits) {
  constexpr std::uint32_t kWordBits = 32;
  std::fill(bits.begin(), bits.end(), 0);
  bool may_end = false;
  try {
    may_end = sequence.constraint->allow(bits);
  } catch (const std::exception& error) {
    throw Error(ErrorCode::invalid_argument, error.what());  // of this request, whatever it was
  }
  for (const TokenId token : sequence.stop_ids) {
    std::uint32_t& word = bits[static_cast<std::uint32_t>(token) / kWordBits];
    const std::uint32_t bit = std::uint32_t{1} << static_cast<std::uint32_t>(token) % kWordBits;
    word = may_end ? word | bit : word & ~bit;
  }
}

/// Appends the row of one drawn token, in the place of one that was never committed.
void store_logprobs(Sequence& sequence, TokenId token, std::span<const float> logits, sampling::Sampler& sampler) {
  const std::size_t stride = 1 + static_cast<std::size_t>(*sequence.request.sampling.logprobs);
  const std::size_t begin = static_cast<std::size_t>(sequence.num_generated()) * stride;
  sequence.logprobs.resize(begin + stride);
  sampler.score(logits, token, std::span(sequence.logprobs).subspan(begin));
}

}  // namespace

HeadRunner::HeadRunner(const model::Model& model)
    : model_(model),
      samplers_(static_cast<std::size_t>(model.pool().num_threads())),
      errors_(kGroupRows),
      allowed_(samplers_.size()) {}

TokenId HeadRunner::draw_token(const Sequence& sequence, std::span<const float> logits, std::size_t thread) {
  std::span<const std::uint32_t> allowed;
  if (sequence.constraint != nullptr) {
    auto& bits = allowed_[thread];
    bits.resize((logits.size() + 31) / 32);
    fill_allowed(sequence, bits);
    allowed = bits;
  }
  return samplers_[thread].sample({.logits = logits,
                                   .params = sequence.request.sampling,
                                   .seed = sequence.seed,
                                   .tokens = sequence.tokens,
                                   .num_prompt = static_cast<std::size_t>(sequence.num_prompt),
                                   .stop_ids = sequence.stop_ids,
                                   .allowed_bits = allowed});
}

/// From the device, with a view of the copy in the place of the original.
void HeadRunner::copy_to_host(Tensor& logits) {
  host_logits_.resize(static_cast<std::size_t>(logits.dim(0) * logits.dim(1)));
  model_.memory()->copy_out(host_logits_.data(), logits.data, host_logits_.size() * sizeof(float));
  check(*model_.memory());
  logits.data = host_logits_.data();
}

void HeadRunner::run(Tensor hidden, const StepBatch& batch, const StepPlan& plan, std::span<TokenId> sampled,
                     ops::ExecContext& ctx, EngineStats& stats, StepTrace* trace) {
  const std::int64_t vocab_size = model_.config().vocab_size;
  logits_rows_ = 0;
  for (std::size_t begin = 0; begin < batch.logit_uses.size(); begin += kGroupRows) {
    const std::size_t count = std::min<std::size_t>(kGroupRows, batch.logit_uses.size() - begin);
    const auto rows = std::span(batch.inputs.logit_rows).subspan(begin, count);
    std::array<TokenId, kGroupRows> argmax{};
    Group group{.uses = std::span(batch.logit_uses).subspan(begin, count),
                .argmax = std::span(argmax).first(count),
                .logits = {},
                .plan = plan,
                .sampled = sampled};
    const Workspace::Scope scope(*ctx.workspace);
    const auto wanted = [&](const LogitUse& use) { return needs_logits(use, plan); };
    if (std::any_of(group.uses.begin(), group.uses.end(), wanted)) {
      float* memory = ctx.workspace->allocate_array<float>(count * static_cast<std::size_t>(vocab_size));
      group.logits = Tensor(memory, DType::f32, {static_cast<std::int64_t>(count), vocab_size});
      logits_rows_ = std::max(logits_rows_, static_cast<int>(count));
    }
    {
      const PhaseTimer timer(stats.forward_seconds, trace, "head");
      model_.decoder().head(hidden, rows, group.logits, std::span(argmax).first(count), ctx);
      if (group.logits && model_.memory() != nullptr) copy_to_host(group.logits);
    }
    const PhaseTimer timer(stats.sample_seconds, trace, "sample");
    std::fill(errors_.begin(), errors_.end(), nullptr);
    model_.pool().run([&](const Part& part) { finish_rows(group, part); });
    for (const std::exception_ptr& error : errors_) {
      if (error) std::rethrow_exception(error);
    }
  }
}

/// A thread's share of a group. Rows do not influence each other, so the split does not matter. Must not throw.
void HeadRunner::finish_rows(const Group& group, const Part& part) {
  for (std::size_t row = static_cast<std::size_t>(part.index); row < group.uses.size();
       row += static_cast<std::size_t>(part.count)) {
    try {
      finish_row(group, row, static_cast<std::size_t>(part.index));
    } catch (const Error& error) {
      // The request's own fault stays its own: the others of the step go on.
      if (error.code() == ErrorCode::invalid_argument) {
        const int entry = group.uses[row].entry;
        group.plan.entries[static_cast<std::size_t>(entry)].sequence->error = error.what();
      } else {
        errors_[row] = std::current_exception();
      }
    } catch (...) {
      errors_[row] = std::current_exception();
    }
  }
}

void HeadRunner::finish_row(const Group& group, std::size_t row, std::size_t thread) {
  sampling::Sampler& sampler = samplers_[thread];
  const LogitUse& use = group.uses[row];
  const std::size_t entry = static_cast<std::size_t>(use.entry);
  Sequence& sequence = *group.plan.entries[entry].sequence;
  std::span<const float> logits;
  if (needs_logits(use, group.plan)) {
    logits = {group.logits.as<float>() + static_cast<std::int64_t>(row) * group.logits.row_stride,
              static_cast<std::size_t>(group.logits.dim(1))};
  }
  if (use.scores) store_prompt_score(sequence, use.position, logits, sampler);
  if (!use.samples) return;
  const TokenId token = takes_argmax(sequence) ? group.argmax[row] : draw_token(sequence, logits, thread);
  if (sequence.request.sampling.logprobs) store_logprobs(sequence, token, logits, sampler);
  group.sampled[entry] = token;
}

}  // namespace nb::engine
