#include "engine/draft_model.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"
#include "engine/head_runner.h"
#include "engine/kv_budget.h"
#include "engine/metrics.h"
#include "ops/ops.h"
#include "quant/kv_format.h"
#include "tensor/device_memory.h"

namespace nb::engine {

namespace {

constexpr TokenId kNoGuess = -1;

/// Summaries stand for keys of the target alone.
bool is_readable(const Sequence& sequence) {
  return sequence.request.keeps_kv && sequence.request.key_policy.rule != ops::KeyRule::summary;
}

double seconds_since(Clock::time_point begin) { return milliseconds(Clock::now() - begin) / 1e3; }

}  // namespace

quant::KvFormat DraftModel::kv_format_for(quant::KvFormat target_format) {
  return quant::seals_keys(target_format) ? quant::KvFormat::int8 : target_format;
}

kv::KvShape DraftModel::kv_shape(const model::Model& draft, quant::KvFormat target_format) {
  return kv_shape_of(draft.config(), kv_format_for(target_format));
}

void DraftModel::check(const model::Model& draft, const model::Model& target, quant::KvFormat target_format) {
  NB_CHECK(&draft != &target, invalid_argument, "the draft model must be loaded beside the model, not be the same");
  NB_CHECK(draft.backend().name == target.backend().name, unsupported, "the draft model runs on ", draft.backend().name,
           ", the model on ", target.backend().name, "; they must run on the same backend");
  ops::require_kv_format(draft.kernels(), kv_format_for(target_format));
}

DraftModel::DraftModel(Parts parts)
    : parts_(std::move(parts)),
      storage_(kv_shape(parts_.model, parts_.target_format), parts_.num_blocks, parts_.model.memory()),
      num_filled_(static_cast<std::size_t>(parts_.num_blocks), 0),
      workspace_(CachingPool::create(parts_.model.memory())),
      samplers_(static_cast<std::size_t>(parts_.target.pool().num_threads())),
      padded_(samplers_.size()),
      errors_(samplers_.size()) {
  check(parts_.model, parts_.target, parts_.target_format);
}

void DraftModel::copied(kv::BlockCopy copy) {
  std::uint8_t& filled = num_filled_[static_cast<std::size_t>(copy.to)];
  filled = num_filled_[static_cast<std::size_t>(copy.from)];
  if (filled > 0) storage_.copy(copy.from, copy.to);
}

void DraftModel::cleared(BlockId block) {
  num_filled_[static_cast<std::size_t>(block)] = 0;
  storage_.zero(block);
}

void DraftModel::freed(BlockId block) {
  num_filled_[static_cast<std::size_t>(block)] = 0;
  storage_.poison(block);
}

void DraftModel::mark_slot(int slot) {
  std::uint8_t& filled = num_filled_[static_cast<std::size_t>(slot / kBlockTokens)];
  if (filled == slot % kBlockTokens) ++filled;
}

/// Own tokens [first, first + count) are stored.
void DraftModel::mark(const Sequence& sequence, int first, int count) {
  for (int own = first; own < first + count; ++own) mark_slot(sequence.table.slot_of(own));
}

/// Leading tokens in these blocks whose keys and values are there. What nobody sees any more counts.
int DraftModel::num_known(std::span<const BlockId> blocks) const {
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] == kNoBlock) continue;
    const int filled = num_filled_[static_cast<std::size_t>(blocks[i])];
    if (filled < kBlockTokens) return static_cast<int>(i) * kBlockTokens + filled;
  }
  return static_cast<int>(blocks.size()) * kBlockTokens;
}

bool DraftModel::knows_chunks(const Sequence& sequence) const {
  if (!sequence.composition) return true;
  const auto placed = sequence.composition->chunks();
  return std::all_of(placed.begin(), placed.end(), [&](const PlacedChunk& chunk) {
    const kv::Chunk& stored = parts_.chunks.get(chunk.id);
    return num_known(stored.blocks) >= static_cast<int>(stored.tokens.size());
  });
}

bool DraftModel::can_guess(const Sequence& sequence, int count) const {
  return is_readable(sequence) && sequence.len() + count <= parts_.model.decoder().max_positions();
}

ops::ExecContext DraftModel::context() {
  return {.kernels = &parts_.model.kernels(), .pool = &parts_.target.pool(), .workspace = &workspace_};
}

/// One pass over the rows of `batch_`; returns the residual stream.
Tensor DraftModel::run() {
  model::StepInputs& inputs = batch_.inputs;
  // Of the target's format.
  inputs.open_cells.clear();
  inputs.open_groups.clear();
  inputs.seals.clear();
  inputs.num_step_cells = 0;
  // Ids that only the target has stand for no text.
  const TokenId vocab_size = parts_.model.config().vocab_size;
  std::replace_if(
      inputs.token_ids.begin(), inputs.token_ids.end(), [&](TokenId token) { return token >= vocab_size; }, 0);
  workspace_.reset();
  ops::ExecContext ctx = context();
  num_read_ += inputs.num_tokens();
  return parts_.model.decoder().forward(inputs, storage_, ctx);
}

/// One pass over the entries of `plan_`, whose tokens are stored thereby.
void DraftModel::read(int num_rows) {
  plan_.num_tokens = num_rows;
  build_batch(plan_, parts_.chunks, batch_);
  run();
  for (const PlannedSequence& entry : plan_.entries) mark(*entry.sequence, entry.first, entry.count);
}

void DraftModel::read_along(const StepPlan& plan) {
  const Clock::time_point begin = Clock::now();
  const int max_positions = parts_.model.decoder().max_positions();
  plan_.entries.clear();
  int num_rows = 0;
  for (const PlannedSequence& entry : plan.entries) {
    const Sequence& sequence = *entry.sequence;
    if (entry.selects || entry.decodes() || !is_readable(sequence)) continue;
    if (!sequence.is_internal() && !sequence.request.speculative.value_or(true)) continue;
    if (!knows_chunks(sequence) || num_known(sequence.table.blocks()) < entry.first)
      continue;  // behind what is missing
    PlannedSequence& own = plan_.entries.emplace_back(entry);
    own.samples = false;
    while (own.count > 0 && sequence.position_of(own.first + own.count - 1) >= max_positions) --own.count;
    num_rows += own.count;
    if (own.count == 0) plan_.entries.pop_back();
  }
  if (num_rows > 0) read(num_rows);
  seconds_ += seconds_since(begin);
}

/// Reads what is missing of a chunk, as far as the budget goes; whether that was all.
bool DraftModel::read_chunk(const kv::Chunk& chunk, int& budget) {
  const auto num_tokens = static_cast<int>(chunk.tokens.size());
  const int begin = num_known(chunk.blocks);
  if (begin >= num_tokens) return true;
  const int end = begin + std::min(budget, num_tokens - begin);
  if (end == begin || num_tokens > parts_.model.decoder().max_positions()) return false;
  model::StepInputs& inputs = batch_.inputs;
  inputs.clear();
  for (int i = begin; i < end; ++i) {
    inputs.token_ids.push_back(chunk.tokens[static_cast<std::size_t>(i)]);
    inputs.positions.push_back(i);
    inputs.key_positions.push_back(i);
    const BlockId block = chunk.blocks[static_cast<std::size_t>(i / kBlockTokens)];
    inputs.slots.push_back(block * kBlockTokens + i % kBlockTokens);
  }
  inputs.segments.push_back({.row_begin = 0, .row_count = end - begin, .run_begin = 0, .run_count = 1});
  inputs.runs.push_back({.block_begin = 0, .num_keys = end, .position_offset = 0});
  inputs.blocks.assign(chunk.blocks.begin(), chunk.blocks.begin() + kv::BlockTable::blocks_for(end));
  run();
  for (const std::int32_t slot : inputs.slots) mark_slot(slot);
  budget -= end - begin;
  return end == num_tokens;
}

/// Reads what is missing of a sequence but for few last rows, as far as the budget goes; whether that was all.
bool DraftModel::catch_up(Sequence& sequence, int& budget) {
  if (sequence.composition) {
    for (const PlacedChunk& chunk : sequence.composition->chunks()) {
      if (!read_chunk(parts_.chunks.get(chunk.id), budget)) return false;
    }
  }
  int known = num_known(sequence.table.blocks());
  while (sequence.own_len() - known > kFewRows && budget > 0) {
    const int count = std::min(budget, sequence.own_len() - kFewRows - known);
    plan_.entries.assign(1, {.sequence = &sequence, .first = known, .count = count, .samples = false});
    read(count);
    budget -= count;
    known += count;
  }
  return sequence.own_len() - known <= kFewRows;
}

void DraftModel::guess(std::span<const DraftWish> wishes,
                       const std::function<void(int rows, double seconds)>& measured) {
  Clock::time_point begin = Clock::now();
  parts_.follow_blocks();
  active_.clear();
  int budget = parts_.max_batch_tokens;
  for (const DraftWish& wish : wishes) {
    NB_ASSERT(wish.sequence->drafts.empty() && can_guess(*wish.sequence, wish.count));
    if (catch_up(*wish.sequence, budget)) active_.push_back(wish);
  }
  seconds_ += seconds_since(begin);
  for (int round = 0; !active_.empty(); ++round) {
    begin = Clock::now();
    plan_.entries.clear();
    plan_.num_tokens = 0;
    rows_.clear();
    for (const DraftWish& wish : active_) {
      Sequence& sequence = *wish.sequence;
      const int last = sequence.own_len() - 1 + round;
      const int first = round == 0 ? std::min(last, num_known(sequence.table.blocks())) : last;
      plan_.entries.push_back({.sequence = &sequence, .first = first, .count = last + 1 - first, .samples = true});
      plan_.num_tokens += last + 1 - first;
      rows_.push_back(plan_.num_tokens - 1);
    }
    build_batch(plan_, parts_.chunks, batch_);
    draw(active_, run());
    if (round == 0) {
      for (const PlannedSequence& entry : plan_.entries) mark(*entry.sequence, entry.first, entry.count);
    }
    for (std::size_t i = 0; i < active_.size(); ++i) {
      if (drawn_[i] == kNoGuess) continue;
      Sequence& sequence = *active_[i].sequence;
      sequence.drafts.push_back(drawn_[i]);
      sequence.set_drafts(static_cast<int>(sequence.drafts.size()));
    }
    const auto is_done = [&](const DraftWish& wish) {
      const auto count = static_cast<int>(wish.sequence->drafts.size());
      return count == round || count == wish.count;  // nothing came, or all has come
    };
    active_.erase(std::remove_if(active_.begin(), active_.end(), is_done), active_.end());
    const double seconds = seconds_since(begin);
    seconds_ += seconds;
    measured(plan_.num_tokens, seconds);
  }
}

/// Sets drawn_ for each active sequence, from the last of its rows.
void DraftModel::draw(std::span<DraftWish> wishes, Tensor hidden) {
  constexpr std::size_t kGroup = HeadRunner::kGroupRows;
  const std::int64_t vocab_size = parts_.model.config().vocab_size;
  drawn_.assign(wishes.size(), kNoGuess);
  ops::ExecContext ctx = context();
  for (std::size_t begin = 0; begin < wishes.size(); begin += kGroup) {
    const std::size_t count = std::min(kGroup, wishes.size() - begin);
    const auto group = wishes.subspan(begin, count);
    const auto is_greedy = [](const DraftWish& wish) {
      const Sequence& sequence = *wish.sequence;
      return sampling::is_plain_greedy(sequence.request.sampling,
                                       sequence.num_generated() + static_cast<int>(sequence.drafts.size()));
    };
    const Workspace::Scope scope(workspace_);
    Tensor logits;
    if (!std::all_of(group.begin(), group.end(), is_greedy)) {
      float* memory = workspace_.allocate_array<float>(count * static_cast<std::size_t>(vocab_size));
      logits = Tensor(memory, DType::f32, {static_cast<std::int64_t>(count), vocab_size});
    }
    std::array<TokenId, kGroup> argmax{};
    parts_.model.decoder().head(hidden, std::span(rows_).subspan(begin, count), logits, std::span(argmax).first(count),
                                ctx);
    const float* values = on_host(logits);
    std::fill(errors_.begin(), errors_.end(), nullptr);
    parts_.target.pool().run([&](const Part& part) {
      const auto thread = static_cast<std::size_t>(part.index);
      try {
        for (std::size_t i = thread; i < count; i += static_cast<std::size_t>(part.count)) {
          std::span<const float> row;
          if (!is_greedy(group[i]))
            row = {values + i * static_cast<std::size_t>(vocab_size), static_cast<std::size_t>(vocab_size)};
          draw_row(group[i], row, argmax[i], drawn_[begin + i], samplers_[thread], padded_[thread]);
        }
      } catch (...) {
        errors_[thread] = std::current_exception();
      }
    });
    for (const std::exception_ptr& error : errors_) {
      if (error) std::rethrow_exception(error);
    }
  }
}

/// The logits in the host's memory; null if there are none.
const float* DraftModel::on_host(Tensor logits) {
  if (!logits || parts_.model.memory() == nullptr) return logits ? logits.as<float>() : nullptr;
  const auto count = static_cast<std::size_t>(logits.dim(0) * logits.dim(1));
  host_logits_.resize(count);
  parts_.model.memory()->copy_out(host_logits_.data(), logits.as<float>(), count * sizeof(float));
  nb::check(*parts_.model.memory());
  return host_logits_.data();
}

/// Guesses the token behind the drafts that a sequence has. `logits`: empty where that is `argmax`. Constraints are not
/// asked: what they forbid is a wrong guess.
void DraftModel::draw_row(const DraftWish& wish, std::span<const float> logits, TokenId argmax, TokenId& drawn,
                          sampling::Sampler& sampler, std::vector<float>& padded) const {
  const Sequence& sequence = *wish.sequence;
  const auto vocab_size = static_cast<std::size_t>(parts_.target.config().vocab_size);
  TokenId token = argmax;
  if (!logits.empty()) {
    if (logits.size() < vocab_size) {
      padded.assign(vocab_size, -std::numeric_limits<float>::infinity());
      std::copy(logits.begin(), logits.end(), padded.begin());
      logits = padded;
    }
    sampling::SampleInput input = sample_input(sequence, static_cast<int>(sequence.drafts.size()));
    input.logits = logits.first(vocab_size);
    try {
      token = sampler.sample(input);
    } catch (const Error&) {
      return;  // masks leave nothing, or nothing that this model has
    }
  }
  if (static_cast<std::size_t>(token) >= vocab_size || sequence.stops_at(token)) return;
  drawn = token;
}

void DraftModel::settle(const Sequence& sequence, int num_accepted) {
  // The last guess has not been read.
  const int num_stored = std::min(num_accepted, static_cast<int>(sequence.drafts.size()) - 1);
  if (num_stored > 0) mark(sequence, sequence.own_len(), num_stored);
}

}  // namespace nb::engine
