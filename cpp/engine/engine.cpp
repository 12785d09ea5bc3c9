#include "engine/engine.h"

#include <algorithm>
#include <exception>

#include "base/error.h"
#include "base/memory_info.h"
#include "engine/cascade_plan.h"
#include "engine/kv_budget.h"
#include "engine/prompt_scores.h"

namespace nb::engine {

namespace {

EngineOptions resolve(EngineOptions options, const model::Model& model) {
  const int longest = model.decoder().max_positions();
  NB_CHECK(options.max_model_len >= 0 && options.max_model_len <= longest, invalid_argument,
           "max_model_len must be in [1, ", longest, "] (the model's positions), or 0 for all, got ",
           options.max_model_len);
  NB_CHECK(options.max_num_seqs >= 1, invalid_argument, "max_num_seqs must be >= 1, got ", options.max_num_seqs);
  NB_CHECK(options.kv_cache_bytes >= 0, invalid_argument, "kv_cache_bytes must be >= 1, or 0 for the default, got ",
           options.kv_cache_bytes);
  for (const TokenId token : options.eos_ids) {
    NB_CHECK(token >= 0 && token < model.config().vocab_size, invalid_argument, "eos_ids contains ", token,
             ", outside the vocabulary [0, ", model.config().vocab_size, ")");
  }
  if (options.max_model_len == 0) options.max_model_len = longest;
  if (!options.kv_format) options.kv_format = model.default_kv_format();
  return options;
}

kv::KvStorage make_storage(const model::ModelConfig& config, const EngineOptions& options) {
  const kv::KvShape shape{.format = *options.kv_format,
                          .num_layers = config.num_layers,
                          .num_kv_heads = config.num_kv_heads,
                          .head_dim = config.head_dim};
  return {shape, choose_num_blocks({.block_bytes = shape.block_bytes(),
                                    .kv_cache_bytes = options.kv_cache_bytes,
                                    .available_bytes = memory_info().available_bytes,
                                    .max_num_seqs = options.max_num_seqs,
                                    .max_model_len = options.max_model_len})};
}

/// Everything but tokens that the KV of this engine depends on; nothing if it keeps none.
std::optional<std::string> fingerprint_of(const model::Model& model, const EngineOptions& options) {
  if (!options.enable_prefix_caching) return std::nullopt;
  const model::ModelConfig& config = model.config();
  return concat(model.backend().kernels->name, ' ', static_cast<int>(model.act_type()), ' ',
                static_cast<int>(*options.kv_format), ' ', config.architecture, ' ', config.num_layers, ' ',
                config.num_kv_heads, ' ', config.head_dim);
}

/// What is new about a sequence; remembers what has been given out, so that no token is reported twice.
StepOutput report(Sequence& sequence, Clock::time_point now) {
  const bool has_token = sequence.num_generated() > 0 || sequence.finish_reason == FinishReason::stop;
  if (has_token && !sequence.times.first_token) sequence.times.first_token = now;
  StepOutput output;
  output.request_id = sequence.id;
  output.choice = sequence.choice;
  output.token_ids.assign(sequence.tokens.begin() + sequence.num_prompt + sequence.num_reported, sequence.tokens.end());
  if (sequence.request.sampling.logprobs) {
    const std::ptrdiff_t stride = 1 + *sequence.request.sampling.logprobs;
    const auto rows = sequence.logprobs.begin();
    output.logprobs.assign(rows + stride * sequence.num_reported, rows + stride * sequence.num_generated());
  }
  output.finish_reason = sequence.finish_reason;
  output.error = sequence.error;
  output.num_prompt_tokens = sequence.num_prompt;
  output.num_cached_tokens = sequence.num_cached_tokens;
  output.metrics = metrics_at(sequence.times, now);
  sequence.num_reported = sequence.num_generated();
  if (sequence.finished() && sequence.finish_reason != FinishReason::abort) {
    output.prompt_logprobs = std::move(sequence.prompt_logprobs);
    output.prompt_logits = std::move(sequence.prompt_logits);
  }
  return output;
}

}  // namespace

Engine::Engine(const model::Model& model, const EngineOptions& options)
    : model_(model),
      options_(resolve(options, model)),
      storage_(make_storage(model.config(), options_)),
      scheduler_({.max_batch_tokens = options_.max_batch_tokens,
                  .max_num_seqs = options_.max_num_seqs,
                  .max_waiting = options_.max_waiting},
                 storage_.num_blocks(), fingerprint_of(model, options_)),
      memory_(CachingPool::create()),
      workspace_(memory_),
      head_(model) {
  batch_.reserve(options_.max_batch_tokens, options_.max_num_seqs,
                 options_.max_num_seqs * kv::BlockTable::blocks_for(options_.max_model_len));
  sampled_.reserve(static_cast<std::size_t>(options_.max_num_seqs));
}

RequestId Engine::submit(Request request) {
  const int vocab_size = model_.config().vocab_size;
  validate(request, vocab_size, options_.max_model_len);
  const Clock::time_point now = Clock::now();
  if (!request.sampling.seed) request.sampling.seed = random_seed();  // the same for all choices
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (int choice = 0; choice < request.n; ++choice) {
    Request one = request;
    if (choice > 0) {  // the first one has the scores
      one.prompt_logprobs.reset();
      one.prompt_logits = false;
    }
    sequences.push_back(
        std::make_unique<Sequence>(next_id_, std::move(one), options_.eos_ids, options_.max_model_len, choice));
    sequences.back()->times.submitted = now;
    reserve_prompt_scores(*sequences.back(), vocab_size);
  }
  scheduler_.submit(std::move(sequences));
  return next_id_++;
}

void Engine::cancel(RequestId id) { scheduler_.cancel(id); }

std::vector<StepOutput> Engine::step() {
  try {
    return run_step();
  } catch (...) {
    recover();
    throw;
  }
}

std::vector<StepOutput> Engine::run_step() {
  const Clock::time_point begun = Clock::now();
  const StepPlan* plan = nullptr;
  {
    const Stopwatch watch(stats_.plan_seconds);
    plan = &scheduler_.plan(times_.prompt_rows());
    update_storage();
    build_batch(*plan, batch_);
    cascade_saved_ = options_.cascade ? plan_cascade(batch_.inputs, model_.config().sliding_window) : 0;
  }
  sampled_.assign(plan->entries.size(), 0);
  if (plan->num_tokens > 0) {
    const Clock::time_point started = Clock::now();
    forward(*plan);
    int decode_rows = 0;
    for (const PlannedSequence& entry : plan->entries) decode_rows += entry.count == 1 ? 1 : 0;
    times_.record(decode_rows, plan->num_tokens - decode_rows, milliseconds(Clock::now() - started) / 1e3);
  }
  {
    const Stopwatch watch(stats_.plan_seconds);
    scheduler_.commit(*plan, sampled_);
    update_storage();
  }
  std::vector<StepOutput> outputs = collect(*plan, begun);
#ifdef NDEBUG
  if (!scheduler_.has_work()) check_invariants();
#else
  check_invariants();
#endif
  return outputs;
}

/// Computes the KV of every planned row and the token of every entry that samples.
void Engine::forward(const StepPlan& plan) {
  workspace_.reset();
  [[maybe_unused]] const std::size_t growths = workspace_.num_growths();
  ops::ExecContext ctx{.kernels = model_.backend().kernels, .pool = &model_.pool(), .workspace = &workspace_};
  Tensor hidden;
  {
    const Stopwatch watch(stats_.forward_seconds);
    hidden = model_.decoder().forward(batch_.inputs, storage_, ctx);
  }
  head_.run(hidden, batch_, plan, sampled_, ctx, stats_);
  ++stats_.steps;
  stats_.cascade_saved_tokens += cascade_saved_;
#ifndef NDEBUG
  NB_ASSERT(!shapes_.seen_at_least(batch_, head_.logits_rows()) || workspace_.num_growths() == growths);
#endif
}

/// Follows the scheduler's blocks with their memory: copies are made while their sources are whole, and freed blocks
/// poisoned before new ones, which may be the same, are cleared.
void Engine::update_storage() {
  for (const kv::BlockCopy& copy : scheduler_.copies()) storage_.copy(copy.from, copy.to);
  scheduler_.copies().clear();
  for (const BlockId block : scheduler_.freed_blocks()) storage_.poison(block);
  for (const BlockId block : scheduler_.fresh_blocks()) storage_.zero(block);
  scheduler_.freed_blocks().clear();
  scheduler_.fresh_blocks().clear();
}

/// Outputs of the sequences that took part and go on, then of those that ended.
std::vector<StepOutput> Engine::collect(const StepPlan& plan, Clock::time_point begun) {
  const Clock::time_point now = Clock::now();
  std::vector<StepOutput> outputs;
  outputs.reserve(plan.entries.size() + scheduler_.finished().size());
  for (const PlannedSequence& entry : plan.entries) {
    Sequence& sequence = *entry.sequence;
    stats_.prompt_tokens += std::max(0, std::min(entry.first + entry.count, sequence.num_prompt) - entry.first);
    if (!sequence.times.first_planned) sequence.times.first_planned = begun;
    if (!sequence.finished()) outputs.push_back(report(sequence, now));
  }
  for (const auto& sequence : scheduler_.finished()) outputs.push_back(report(*sequence, now));
  for (const StepOutput& output : outputs) {
    stats_.generated_tokens += static_cast<std::int64_t>(output.token_ids.size());
  }
  scheduler_.forget_finished();
  return outputs;
}

/// After an exception: nothing was committed, but whatever caused it would come again, so the running sequences end.
void Engine::recover() {
  scheduler_.cancel_running();
  past_growths_ += workspace_.num_growths();
  workspace_ = Workspace(memory_);
  shapes_.forget();
}

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  stats.running = scheduler_.num_running();
  stats.waiting = scheduler_.num_waiting();
  stats.blocks_total = scheduler_.pool().num_blocks();
  stats.blocks_free = scheduler_.pool().num_free();
  stats.blocks_owned = scheduler_.pool().num_owned();
  stats.blocks_cached = scheduler_.pool().num_cached();
  stats.prefix_hit_tokens = scheduler_.counters().prefix_hit_tokens;
  stats.forked_tokens = scheduler_.counters().forked_tokens;
  stats.preemptions = scheduler_.counters().preemptions;
  stats.kv_bytes = storage_.bytes();
  stats.workspace_bytes = static_cast<std::int64_t>(workspace_.high_water_bytes());
  stats.workspace_growths = static_cast<std::int64_t>(past_growths_ + workspace_.num_growths());
  return stats;
}

}  // namespace nb::engine
