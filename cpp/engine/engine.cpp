#include "engine/engine.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <new>
#include <thread>

#include "base/error.h"
#include "base/log.h"
#include "base/memory_info.h"
#include "engine/cascade_plan.h"
#include "engine/disk_tier.h"
#include "engine/kv_budget.h"
#include "engine/prompt_scores.h"
#include "ops/ops.h"
#include "quant/kv_format.h"
#include "sampling/accept.h"
#include "tensor/device_memory.h"

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
  if (options.speculative) validate(*options.speculative);
  if (options.max_model_len == 0) options.max_model_len = longest;
  if (!options.kv_format) options.kv_format = model.default_kv_format();
  ops::require_kv_format(model.kernels(), *options.kv_format);
  return options;
}

/// Of the memory a device has free when an engine starts. What is left is for the workspace of steps and for others.
constexpr double kDeviceShare = 0.85;

kv::KvStorage make_storage(const model::Model& model, const EngineOptions& options) {
  const DeviceMemory* const device = model.memory();
  const kv::KvShape shape = kv_shape_of(model.config(), *options.kv_format);
  // A draft model stores as many blocks.
  std::int64_t draft_bytes = 0;
  if (options.speculative && options.speculative->draft_model != nullptr) {
    draft_bytes = DraftModel::kv_shape(*options.speculative->draft_model, shape.format).block_bytes();
  }
  KvBudget budget{.block_bytes = shape.block_bytes() + draft_bytes,
                  .kv_cache_bytes = options.kv_cache_bytes,
                  .available_bytes = memory_info().available_bytes,
                  .max_num_seqs = options.max_num_seqs,
                  .max_model_len = options.max_model_len};
  const int num_open_cells = quant::seals_keys(shape.format) ? 2 * options.max_num_seqs : 0;
  if (device != nullptr) {
    const std::int64_t open_bytes = kv::OpenCells::bytes_for(shape, num_open_cells);
    budget.available_bytes = std::max<std::int64_t>(static_cast<std::int64_t>(device->free_bytes()) - open_bytes, 1);
    budget.share = kDeviceShare;
  }
  return {shape, choose_num_blocks(budget), device, num_open_cells};
}

/// Everything but tokens that the KV of this engine depends on; nothing if it keeps none.
std::optional<std::string> fingerprint_of(const model::Model& model, const EngineOptions& options) {
  if (!options.enable_prefix_caching) return std::nullopt;
  return to_hex(kv_fingerprint(model, *options.kv_format, options.kv_store_fingerprint));
}

/// Reading is copying and summing up, at which one thread is slower than the memory.
constexpr int kMostReaders = 4;

std::unique_ptr<DiskTier> make_tier(const model::Model& model, const EngineOptions& options, kv::KvStorage& storage,
                                    std::function<void()> settle, std::function<void()> wake) {
  if (options.kv_store_path.empty()) return nullptr;
  NB_CHECK(options.kv_store_bytes >= 1, invalid_argument, "kv_store_bytes must be >= 1, got ", options.kv_store_bytes);
  return std::make_unique<DiskTier>(options.kv_store_path, options.kv_store_bytes,
                                    kv_fingerprint(model, *options.kv_format, options.kv_store_fingerprint),
                                    DiskTier::Parts{.storage = storage,
                                                    .num_readers = std::min(model.pool().num_threads(), kMostReaders),
                                                    .settle = std::move(settle),
                                                    .wake = std::move(wake)});
}

/// Layers that are read while a step runs lie elsewhere in the next one.
bool records_steps(const model::Model& model, const EngineOptions& options) {
  return !options.enforce_eager && model.weights().stream == nullptr;
}

std::unique_ptr<Speculator> make_speculator(const model::Model& model, const EngineOptions& options,
                                            const kv::ChunkStore& chunks, int num_blocks,
                                            std::function<void()> follow_blocks) {
  if (!options.speculative) return nullptr;
  // Else a token that is verified beside others may not be the one that it would be alone.
  NB_CHECK(model.memory() == nullptr || model.deterministic(), unsupported,
           "speculation on a device needs deterministic kernels, which give the same bits for any number of rows");
  std::unique_ptr<DraftModel> draft_model;
  if (options.speculative->draft_model != nullptr) {
    draft_model = std::make_unique<DraftModel>(DraftModel::Parts{.model = *options.speculative->draft_model,
                                                                 .target = model,
                                                                 .chunks = chunks,
                                                                 .target_format = *options.kv_format,
                                                                 .num_blocks = num_blocks,
                                                                 .max_batch_tokens = options.max_batch_tokens,
                                                                 .follow_blocks = std::move(follow_blocks)});
  }
  return std::make_unique<Speculator>(*options.speculative, static_cast<int>(model.config().vocab_size),
                                      std::move(draft_model));
}

/// A time so far away that the clock cannot tell it is none.
Clock::time_point deadline_after(Clock::time_point start, double seconds) {
  const std::chrono::duration<double> left = Clock::time_point::max() - start;
  if (seconds >= left.count() / 2) return Clock::time_point::max();
  return start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

ReuseReport reuse_of(const Sequence& sequence) {
  ReuseReport report{.exact_prefix = sequence.num_cached_tokens};
  if (const Composition* composition = sequence.composition.get()) {
    report.mode = composition->mode();
    report.recomputed = composition->num_recomputed();
    report.isolated = composition->num_chunk_tokens() - report.recomputed;
    // A fork shares tokens behind chunks too, which are not exact: they were computed for this prompt.
    report.exact_prefix = std::min(report.exact_prefix, sequence.exact_len());
  }
  const int num_rows = sequence.len() - (sequence.generates() ? 1 : 0);  // nobody has computed the last output token
  report.policy_applied = num_rows > ops::exact_tokens(sequence.request.key_policy);
  report.computed = sequence.num_prompt - report.exact_prefix - report.isolated - report.recomputed;
  return report;
}

/// What is new about a sequence; remembers what has been given out, so that no token is reported twice.
StepOutput report(Sequence& sequence, Clock::time_point now, StepTrace* trace) {
  const AnswerId answer{.request = sequence.id, .choice = sequence.choice};
  const bool has_token = sequence.num_generated() > 0 || sequence.finish_reason == FinishReason::stop;
  if (has_token && !sequence.times.first_token) {
    sequence.times.first_token = now;
    if (trace != nullptr) trace->first_token(answer, now);
  }
  if (sequence.num_generated() > sequence.num_reported) sequence.times.last_token = now;
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
  output.error_code = sequence.error_code;
  output.num_prompt_tokens = sequence.num_prompt;
  output.num_cached_tokens = sequence.num_cached_tokens;
  output.first_logits = sequence.first_logits();
  output.reuse = reuse_of(sequence);
  output.num_drafted = sequence.num_drafted;
  output.num_accepted = sequence.num_accepted;
  output.metrics = metrics_at(sequence.times, sequence.num_generated(), now);
  sequence.num_reported = sequence.num_generated();
  const bool cut_short = sequence.finish_reason == FinishReason::abort ||
                         (sequence.finish_reason == FinishReason::timeout && sequence.num_generated() == 0);
  if (sequence.finished() && !cut_short) {
    output.prompt_logprobs = std::move(sequence.prompt_logprobs);
    output.prompt_logits = std::move(sequence.prompt_logits);
  }
  if (sequence.finished() && trace != nullptr) {
    trace->ended(answer, sequence.finish_reason, sequence.num_generated(), sequence.num_cached_tokens, now);
  }
  return output;
}

}  // namespace

Engine::Engine(const model::Model& model, const EngineOptions& options, std::function<void()> wake)
    : model_(model),
      options_(resolve(options, model)),
      storage_(make_storage(model, options_)),
      scheduler_({.max_batch_tokens = options_.max_batch_tokens,
                  .max_num_seqs = options_.max_num_seqs,
                  .max_waiting = options_.max_waiting,
                  .seals_keys = quant::seals_keys(*options_.kv_format)},
                 storage_.num_blocks(), fingerprint_of(model, options_)),
      memory_(CachingPool::create(model.memory())),
      workspace_(memory_),
      head_(model),
      selection_(model),
      arrays_(model.memory()),
      graphs_(records_steps(model, options_) ? model.memory() : nullptr),
      traffic_(model, storage_.shape()),
      tier_(make_tier(
          model, options_, storage_, [this] { update_storage(); }, std::move(wake))) {
  if (tier_ != nullptr) scheduler_.set_archive(*tier_);
  speculator_ =
      make_speculator(model, options_, scheduler_.chunks(), storage_.num_blocks(), [this] { update_storage(); });
  if (speculator_ != nullptr) scheduler_.set_draft_source(*speculator_);
  if (!options_.trace_path.empty()) trace_ = std::make_unique<StepTrace>(options_.trace_path);
  batch_.reserve(options_.max_batch_tokens, options_.max_num_seqs,
                 options_.max_num_seqs * kv::BlockTable::blocks_for(options_.max_model_len));
  sampled_.reserve(static_cast<std::size_t>(options_.max_num_seqs + options_.max_batch_tokens));
  const int num_tokens = storage_.num_blocks() * kBlockTokens;
  log(LogLevel::info, "KV cache: ", storage_.bytes(), " bytes reserved for ", num_tokens, " tokens",
      num_tokens < options_.max_model_len ? concat(", less than max_model_len (", options_.max_model_len, ")") : "");
}

std::vector<std::unique_ptr<Sequence>> Engine::prepare(Request request) const {
  const int vocab_size = model_.config().vocab_size;
  validate(request, vocab_size, options_.max_model_len);
  if (request.key_policy.rule != ops::KeyRule::full) ops::require_key_policies(model_.kernels());
  NB_CHECK(request.key_policy.rule != ops::KeyRule::summary || model_.config().sliding_window == 0, unsupported,
           "kv_policy chunk_summary is not offered for models whose attention has a window of its own, this one's is ",
           model_.config().sliding_window);
  NB_CHECK(request.key_policy.rule != ops::KeyRule::summary || !quant::seals_keys(*options_.kv_format), unsupported,
           "kv_policy chunk_summary is not offered with kv_dtype ", quant::to_string(*options_.kv_format));
  NB_CHECK(!request.speculative.value_or(false) || options_.speculative, invalid_argument,
           "speculative is true, but this engine does not speculate");
  RequestTimes times{.submitted = Clock::now()};
  if (request.timeout_seconds > 0.0) times.deadline = deadline_after(times.submitted, request.timeout_seconds);
  if (!request.sampling.seed) request.sampling.seed = random_seed();  // the same for all choices
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (int choice = 0; choice < request.n; ++choice) {
    Request one = request;
    if (choice > 0) {  // the first one has the scores
      one.prompt_logprobs.reset();
      one.prompt_logits = false;
    }
    sequences.push_back(
        std::make_unique<Sequence>(RequestId{0}, std::move(one), options_.eos_ids, options_.max_model_len, choice));
    sequences.back()->times = times;
    scheduler_.check_fits(*sequences.back());
    reserve_prompt_scores(*sequences.back(), vocab_size);
  }
  return sequences;
}

void Engine::submit(RequestId id, std::vector<std::unique_ptr<Sequence>> answers) {
  NB_ASSERT(id >= next_id_);
  for (auto& sequence : answers) sequence->id = id;
  const int num_answers = static_cast<int>(answers.size());
  const int num_prompt = answers.front()->num_prompt;
  const Clock::time_point submitted = answers.front()->times.submitted;
  was_idle_ = false;
  scheduler_.submit(std::move(answers));
  for (int choice = 0; trace_ != nullptr && choice < num_answers; ++choice) {
    trace_->submitted({.request = id, .choice = choice}, num_prompt, submitted);
  }
  next_id_ = id + 1;
}

RequestId Engine::submit(Request request) {
  const RequestId id = next_id_;
  submit(id, prepare(std::move(request)));
  return id;
}

void Engine::cancel(RequestId id) {
  was_idle_ = false;
  scheduler_.cancel(id);
}

bool Engine::waits_for_load() const {
  return was_idle_ && tier_->progress() == seen_progress_ && Clock::now() < wait_deadline_;
}

std::vector<StepOutput> Engine::step() {
  if (waits_for_load()) tier_->wait(seen_progress_, wait_deadline_);
  return step_at_once();
}

std::vector<StepOutput> Engine::step_at_once() {
  const Clock::time_point begun = Clock::now();
  try {
    return run_step(begun);
  } catch (const Error& error) {
    recover(error.code(), error.what(), begun);
    throw;
  } catch (const std::bad_alloc&) {
    recover(ErrorCode::out_of_memory, "not enough memory for a step", begun);
    throw;
  } catch (const std::exception& error) {
    recover(ErrorCode::internal, error.what(), begun);
    throw;
  }
}

std::vector<StepOutput> Engine::run_step(Clock::time_point begun) {
  EngineStats before = stats_;
  before.preemptions = scheduler_.counters().preemptions;
  was_idle_ = false;
  if (tier_ != nullptr) seen_progress_ = tier_->progress();
  scheduler_.end_overdue(begun);
  const StepPlan* plan = nullptr;
  {
    const PhaseTimer timer(stats_.plan_seconds, trace_.get(), "plan");
    plan = &scheduler_.plan(times_.prompt_budget(scheduler_.demand()));
    update_storage();
    build_batch(*plan, scheduler_.chunks(), batch_);
    cascade_saved_ = options_.cascade ? plan_cascade(batch_.inputs, model_.config().sliding_window) : 0;
  }
  sampled_.assign(static_cast<std::size_t>(plan->num_draws), sampling::kNotDrawn);
  select(*plan);
  if (plan->num_tokens > 0) {
    const Clock::time_point started = Clock::now();
    forward(*plan);
    if (draft_model() != nullptr) draft_model()->read_along(*plan);
    record_time(*plan, milliseconds(Clock::now() - started) / 1e3);
  }
  {
    const PhaseTimer timer(stats_.plan_seconds, trace_.get(), "commit");
    scheduler_.commit(*plan, sampled_);
    update_storage();
  }
  was_idle_ = plan->entries.empty() && scheduler_.finished().empty() && scheduler_.is_loading();
  if (was_idle_) wait_deadline_ = scheduler_.next_deadline();
  std::vector<StepOutput> outputs = collect(*plan, begun);
  measure(*plan, before, begun);
  save_next();
#ifdef NDEBUG
  if (!scheduler_.has_work()) check_invariants();
#else
  check_invariants();
#endif
  return outputs;
}

bool Engine::save_next() {
  if (tier_ == nullptr || tier_->is_busy()) return false;
  // What is there already costs little.
  while (has_saves() && tier_->has(scheduler_.saves().front())) scheduler_.pop_save();
  if (!has_saves()) return false;
  tier_->save(scheduler_.saves().front());
  scheduler_.pop_save();
  return true;
}

void Engine::finish_saving(std::chrono::duration<double> time) {
  if (tier_ == nullptr) return;
  const Clock::time_point begun = Clock::now();
  const auto left = [&] { return time - std::chrono::duration<double>(Clock::now() - begun); };
  while (has_saves() && left().count() > 0) {
    if (!save_next()) std::this_thread::sleep_for(kSavePause);
  }
  scheduler_.drop_saves();
  tier_->finish(std::max(left(), std::chrono::duration<double>::zero()));
}

Engine::~Engine() {
  try {
    finish_saving(kSaveAtEnd);
  } catch (const std::exception& error) {
    log(LogLevel::error, "what was to be kept is given up: ", error.what());
  }
}

bool Engine::remove_chunk(kv::ChunkId id) {
  was_idle_ = false;
  const auto found = scheduler_.chunks().chunks().find(id);
  if (tier_ != nullptr && found != scheduler_.chunks().chunks().end()) {
    tier_->erase_chunk(found->second.key);
  }
  return scheduler_.remove_chunk(id);
}

/// For the operators of one step.
ops::ExecContext Engine::context() {
  return {.kernels = &model_.kernels(), .pool = &model_.pool(), .workspace = &workspace_, .counts = &stats_.ops};
}

/// Measures the tokens of chunks that the plan wants measured.
void Engine::select(const StepPlan& plan) {
  for (const PlannedSequence& entry : plan.entries) {
    if (!entry.selects) continue;
    const PhaseTimer timer(stats_.forward_seconds, trace_.get(), "select");
    ops::ExecContext ctx = context();
    selection_.run(entry, storage_, scheduler_.chunks(), ctx);
    stats_.measured_tokens += entry.count;
  }
}

/// Computes the KV of every planned row and the token of every entry that samples.
void Engine::forward(const StepPlan& plan) {
  if (workspace_.has_overflowed() || arrays_.would_move(batch_.inputs)) graphs_.drop();
  workspace_.reset();
  [[maybe_unused]] const std::size_t growths = workspace_.num_growths();
  arrays_.upload(batch_.inputs, HeadRunner::kGroupRows, workspace_);
  ops::ExecContext ctx = context();
  const std::optional<StepGraphs::Shape> shape = graphs_.shape_of(batch_, HeadRunner::kGroupRows);
  if (shape) {
    run_recorded(*shape, plan, ctx);
  } else {
    Tensor hidden;
    {
      const PhaseTimer timer(stats_.forward_seconds, trace_.get(), "forward");
      hidden = model_.decoder().forward(batch_.inputs, storage_, ctx);
    }
    head_.run(hidden, batch_, plan, sampled_, ctx, stats_, trace_.get());
  }
  ++stats_.steps;
  stats_.cascade_saved_tokens += cascade_saved_;
#ifndef NDEBUG
  // A step that can be recorded has its logits beside its layers, for which the first of them may need room.
  NB_ASSERT(!shapes_.seen_at_least(batch_, head_.logits_rows()) || workspace_.num_growths() == growths || shape);
#endif
}

/// The same for a step that may be recorded, or was. What its work is given lies where it lay before: the arrays, and
/// whatever comes from the workspace, which is asked for the same things in the same order.
void Engine::run_recorded(StepGraphs::Shape shape, const StepPlan& plan, ops::ExecContext& ctx) {
  const model::Decoder& decoder = model_.decoder();
  decoder.check(batch_.inputs);  // what is started again checks nothing
  const HeadRunner::Head compute = [&](std::span<const std::int32_t> rows, Tensor logits, std::span<TokenId> argmax) {
    const Workspace::Scope scope(workspace_);
    TokenId* const found = workspace_.allocate_array<TokenId>(argmax.size());
    const auto work = [&] {
      const Workspace::Scope inner(workspace_);
      decoder.head(decoder.forward(batch_.inputs, storage_, ctx), rows, logits, found, ctx);
    };
    shape.has_logits = static_cast<bool>(logits);
    graphs_.run(shape, work, stats_.ops);
    model_.memory()->copy_out(argmax.data(), found, argmax.size_bytes());
    nb::check(*model_.memory());
  };
  head_.run(compute, "forward", batch_, plan, sampled_, ctx, stats_, trace_.get());
  stats_.graphs_recorded = graphs_.recorded();
  stats_.graph_steps = graphs_.replayed();
}

/// Follows the scheduler's blocks with their memory: copies are made while their sources are whole, and freed blocks
/// poisoned before new ones, which may be the same, are cleared.
void Engine::update_storage() {
  DraftModel* const draft = draft_model();
  for (const kv::BlockCopy& copy : scheduler_.copies()) {
    storage_.copy(copy.from, copy.to);
    if (draft != nullptr) draft->copied(copy);
  }
  scheduler_.copies().clear();
  for (const BlockId block : scheduler_.freed_blocks()) {
    storage_.poison(block);
    if (draft != nullptr) draft->freed(block);
  }
  for (const BlockId block : scheduler_.fresh_blocks()) {
    storage_.zero(block);
    if (draft != nullptr) draft->cleared(block);
  }
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
    if (!entry.selects) {
      stats_.prompt_tokens += std::max(0, std::min(entry.first + entry.count, sequence.num_own_prompt()) - entry.first);
    }
    if (sequence.is_internal()) continue;
    if (!sequence.times.first_planned) {
      sequence.times.first_planned = begun;
      if (trace_ != nullptr) trace_->first_step({.request = sequence.id, .choice = sequence.choice}, begun);
    }
    if (!sequence.finished()) outputs.push_back(report(sequence, now, trace_.get()));
  }
  for (const auto& sequence : scheduler_.finished()) {
    if (!sequence->is_internal()) outputs.push_back(report(*sequence, now, trace_.get()));
  }
  for (const StepOutput& output : outputs) {
    stats_.generated_tokens += static_cast<std::int64_t>(output.token_ids.size());
  }
  scheduler_.forget_finished();
  return outputs;
}

/// After an exception: nothing was committed, but whatever caused it would come again, so the running sequences end.
void Engine::recover(ErrorCode code, const char* error, Clock::time_point begun) {
  if (trace_ != nullptr) trace_->step({.index = stats_.steps, .failed = true}, begun, Clock::now());
  scheduler_.cancel_running(code, error);
  past_growths_ += workspace_.num_growths();
  graphs_.drop();
  workspace_ = Workspace(memory_);
  shapes_.forget();
}

}  // namespace nb::engine
