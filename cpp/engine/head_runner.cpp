#include "engine/head_runner.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "engine/prompt_scores.h"
#include "sampling/accept.h"
#include "tensor/device_memory.h"

namespace nb::engine {

/// Up to kGroupRows logit rows between the head and the sampler.
struct HeadRunner::Group {
  /// What has become of a row: nothing yet, `tokens` has its token, or its request ends with an error.
  enum class Outcome : std::uint8_t { open, drawn, failed };

  std::span<const LogitUse> uses;
  Tensor logits;  ///< f32[uses, V], or empty where every row is plain greedy
  const StepPlan& plan;
  std::span<TokenId> sampled;
  std::array<TokenId, kGroupRows> tokens{};  ///< the argmax of the row, or what a device has drawn
  std::array<Outcome, kGroupRows> outcomes{};

  const PlannedSequence& entry(std::size_t row) const {
    return plan.entries[static_cast<std::size_t>(uses[row].entry)];
  }
  Sequence& sequence(std::size_t row) const { return *entry(row).sequence; }
  /// Where the token of a row that samples goes.
  std::size_t draw(std::size_t row) const { return static_cast<std::size_t>(entry(row).first_draw + uses[row].draft); }
};

namespace {

/// Whether the argmax that the head has found is the token, whatever else its row is wanted for.
bool takes_argmax(const LogitUse& use, const Sequence& sequence) {
  return sequence.constraint == nullptr &&
         sampling::is_plain_greedy(sequence.request.sampling, sequence.num_generated() + use.draft);
}

/// Whether anybody wants to see the logits of a row.
bool shows_logits(const LogitUse& use, const Sequence& sequence) {
  return use.scores || (use.samples && sequence.request.sampling.logprobs);
}

bool needs_logits(const LogitUse& use, const Sequence& sequence) {
  return shows_logits(use, sequence) || (use.samples && !takes_argmax(use, sequence));
}

/// Whether a device that can draw tokens draws that of the row: not where a constraint must see the drafts before it,
/// of which it is not known yet whether they are right.
bool only_draws(const LogitUse& use, const Sequence& sequence) {
  if (use.draft > 0 && sequence.constraint != nullptr) return false;
  return needs_logits(use, sequence) && !shows_logits(use, sequence);
}

/// Whether the draft of a row is the token that was drawn before it, and the sequence goes on behind that. Lets a
/// constraint take it.
bool goes_on(const LogitUse& use, Sequence& sequence, std::span<const TokenId> drawn) {
  if (use.draft == 0) return true;
  const auto before = static_cast<std::size_t>(use.draft) - 1;
  const TokenId token = sequence.drafts[before];
  if (drawn[before] != token || sequence.stops_at(token)) return false;
  if (sequence.constraint == nullptr) return true;
  sequence.constraint_ends = sequence.constraint->accept(token);
  sequence.num_constrained = use.draft;
  return !sequence.constraint_ends || sequence.num_generated() + use.draft < sequence.request.sampling.min_tokens;
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
void store_logprobs(Sequence& sequence, int draft, TokenId token, std::span<const float> logits,
                    sampling::Sampler& sampler) {
  const std::size_t stride = 1 + static_cast<std::size_t>(*sequence.request.sampling.logprobs);
  const std::size_t begin = static_cast<std::size_t>(sequence.num_generated() + draft) * stride;
  sequence.logprobs.resize(begin + stride);
  sampler.score(logits, token, std::span(sequence.logprobs).subspan(begin));
}

}  // namespace

sampling::SampleInput sample_input(const Sequence& sequence, int num_drafts) {
  return {.logits = {},
          .params = sequence.request.sampling,
          .seed = sequence.seed,
          .tokens = sequence.text_with(num_drafts),
          .num_prompt = static_cast<std::size_t>(sequence.num_prompt),
          .stop_ids = sequence.stop_ids};
}

HeadRunner::HeadRunner(const model::Model& model)
    : model_(model),
      samplers_(static_cast<std::size_t>(model.pool().num_threads())),
      errors_(kGroupRows),
      allowed_(kGroupRows) {}

void HeadRunner::run(Tensor hidden, const StepBatch& batch, const StepPlan& plan, std::span<TokenId> sampled,
                     ops::ExecContext& ctx, EngineStats& stats, StepTrace* trace) {
  const Head head = [&](std::span<const std::int32_t> rows, Tensor logits, std::span<TokenId> argmax) {
    model_.decoder().head(hidden, rows, logits, argmax, ctx);
  };
  run(head, "head", batch, plan, sampled, ctx, stats, trace);
}

void HeadRunner::run(const Head& head, const char* phase, const StepBatch& batch, const StepPlan& plan,
                     std::span<TokenId> sampled, ops::ExecContext& ctx, EngineStats& stats, StepTrace* trace) {
  const std::int64_t vocab_size = model_.config().vocab_size;
  logits_rows_ = 0;
  for (std::size_t begin = 0; begin < batch.logit_uses.size(); begin += kGroupRows) {
    const std::size_t count = std::min<std::size_t>(kGroupRows, batch.logit_uses.size() - begin);
    const auto rows = std::span(batch.inputs.logit_rows).subspan(begin, count);
    Group group{
        .uses = std::span(batch.logit_uses).subspan(begin, count), .logits = {}, .plan = plan, .sampled = sampled};
    const Workspace::Scope scope(*ctx.workspace);
    bool needs_any = false;
    for (std::size_t row = 0; row < count; ++row) needs_any |= needs_logits(group.uses[row], group.sequence(row));
    if (needs_any) {
      float* memory = ctx.workspace->allocate_array<float>(count * static_cast<std::size_t>(vocab_size));
      group.logits = Tensor(memory, DType::f32, {static_cast<std::int64_t>(count), vocab_size});
      logits_rows_ = std::max(logits_rows_, static_cast<int>(count));
    }
    {
      const PhaseTimer timer(stats.forward_seconds, trace, phase);
      head(rows, group.logits, std::span(group.tokens).first(count));
    }
    const PhaseTimer timer(stats.sample_seconds, trace, "sample");
    if (group.logits && ctx.kernels->sample != nullptr) draw_on_device(group, ctx, stats);
    if (group.logits && model_.memory() != nullptr) copy_to_host(group);
    std::fill(errors_.begin(), errors_.end(), nullptr);
    model_.pool().run([&](const Part& part) { finish_rows(group, part); });
    for (const std::exception_ptr& error : errors_) {
      if (error) std::rethrow_exception(error);
    }
  }
}

/// Asks the constraint of a sequence, if it has one. Throws what that throws.
void HeadRunner::find_allowed(const Sequence& sequence, std::size_t row) {
  allowed_[row].clear();
  if (sequence.constraint == nullptr) return;
  allowed_[row].resize((static_cast<std::size_t>(model_.config().vocab_size) + 31) / 32);
  fill_allowed(sequence, allowed_[row]);
}

/// As sample_input() with what its constraint allows; after find_allowed().
sampling::SampleInput HeadRunner::describe(const Sequence& sequence, int num_drafts, std::size_t row) const {
  sampling::SampleInput input = sample_input(sequence, num_drafts);
  input.allowed_bits = allowed_[row];
  return input;
}

/// A thread's share of the rows that a device is to draw, each with what its constraint allows. Must not throw.
void HeadRunner::find_allowed_rows(Group& group, const Part& part) {
  for (std::size_t row = static_cast<std::size_t>(part.index); row < group.uses.size();
       row += static_cast<std::size_t>(part.count)) {
    Sequence& sequence = group.sequence(row);
    if (!only_draws(group.uses[row], sequence)) continue;
    try {
      find_allowed(sequence, row);
      group.outcomes[row] = Group::Outcome::drawn;
    } catch (const std::exception& error) {
      sequence.error = error.what();
      group.outcomes[row] = Group::Outcome::failed;
    }
  }
}

/// Draws the tokens of rows whose logits nobody wants to see, all with one launch. A row from which nothing can be
/// drawn stays open: the sampler of the host says what is wrong with it.
void HeadRunner::draw_on_device(Group& group, ops::ExecContext& ctx, EngineStats& stats) {
  std::size_t first = group.uses.size(), last = 0;
  for (std::size_t row = 0; row < group.uses.size(); ++row) {
    if (!only_draws(group.uses[row], group.sequence(row))) continue;
    first = std::min(first, row);
    last = row + 1;
  }
  if (first >= last) return;
  model_.pool().run([&](const Part& part) { find_allowed_rows(group, part); });
  // Rows between those that are wanted are drawn too, at no cost beside them.
  sample_rows_.clear();
  for (std::size_t row = first; row < last; ++row) {
    if (group.outcomes[row] == Group::Outcome::drawn) {
      sample_rows_.add(describe(group.sequence(row), group.uses[row].draft, row));
    } else {
      sample_rows_.add_unwanted();
    }
  }
  std::byte* memory = ctx.workspace->allocate(sample_rows_.bytes());
  ctx.kernels->memory->copy_in(memory, sample_rows_.packed_for(memory).data(), sample_rows_.bytes());
  std::array<TokenId, kGroupRows> drawn{};
  Tensor logits(group.logits.as<float>() + static_cast<std::int64_t>(first) * group.logits.row_stride, DType::f32,
                {static_cast<std::int64_t>(last - first), group.logits.dim(1)});
  ops::sample(std::span(drawn).first(last - first), logits, reinterpret_cast<const ops::SampleRow*>(memory), ctx);
  for (std::size_t row = first; row < last; ++row) {
    if (group.outcomes[row] != Group::Outcome::drawn) continue;
    if (drawn[row - first] < 0) {
      group.outcomes[row] = Group::Outcome::open;
      continue;
    }
    group.tokens[row] = drawn[row - first];
    ++stats.drawn_on_device;
  }
}

/// The logits that are still needed, with a view of the copy in the place of the original.
void HeadRunner::copy_to_host(Group& group) {
  const auto vocab_size = static_cast<std::size_t>(group.logits.dim(1));
  host_logits_.resize(group.uses.size() * vocab_size);
  for (std::size_t row = 0; row < group.uses.size(); ++row) {
    if (group.outcomes[row] != Group::Outcome::open || !needs_logits(group.uses[row], group.sequence(row))) continue;
    const float* from = group.logits.as<float>() + static_cast<std::int64_t>(row) * group.logits.row_stride;
    model_.memory()->copy_out(host_logits_.data() + row * vocab_size, from, vocab_size * sizeof(float));
  }
  check(*model_.memory());
  group.logits = Tensor(host_logits_.data(), DType::f32, {group.logits.dim(0), group.logits.dim(1)});
}

/// A thread's share of a group. Rows do not influence each other, so the split does not matter, but for those of
/// drafts, which one thread finishes in order. Must not throw.
void HeadRunner::finish_rows(const Group& group, const Part& part) {
  int owner = -1;
  for (std::size_t row = 0; row < group.uses.size(); ++row) {
    const bool follows = row > 0 && group.uses[row].draft > 0;  // the row before it is of the same sequence
    if (!follows) owner = (owner + 1) % part.count;
    if (owner != part.index) continue;
    try {
      finish_row(group, row, static_cast<std::size_t>(part.index));
    } catch (const Error& error) {
      // The request's own fault stays its own: the others of the step go on.
      if (error.code() == ErrorCode::invalid_argument) {
        group.sequence(row).error = error.what();
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
  Sequence& sequence = group.sequence(row);
  const bool is_drawn = group.outcomes[row] == Group::Outcome::drawn;
  if (group.outcomes[row] == Group::Outcome::failed) return;
  std::span<const float> logits;
  if (!is_drawn && needs_logits(use, sequence)) {
    logits = {group.logits.as<float>() + static_cast<std::int64_t>(row) * group.logits.row_stride,
              static_cast<std::size_t>(group.logits.dim(1))};
  }
  if (use.scores) store_prompt_score(sequence, use.position, logits, sampler);
  if (!use.samples) return;
  const PlannedSequence& entry = group.entry(row);
  const auto drawn =
      group.sampled.subspan(static_cast<std::size_t>(entry.first_draw), static_cast<std::size_t>(entry.num_draws()));
  if (!goes_on(use, sequence, drawn)) return;
  TokenId token = group.tokens[row];
  if (!is_drawn && !takes_argmax(use, sequence)) {
    find_allowed(sequence, row);
    sampling::SampleInput input = describe(sequence, use.draft, row);
    input.logits = logits;
    token = sampler.sample(input);
  }
  if (sequence.request.sampling.logprobs) store_logprobs(sequence, use.draft, token, logits, sampler);
  group.sampled[group.draw(row)] = token;
}

}  // namespace nb::engine
