// One scheduler and one KV pool over one model: requests in, tokens out, one step at a time.
//
// Knows integers, not text and not files. Not thread-safe: one thread calls everything; the model's thread team works
// inside step(). An exception in step() aborts the requests that were running; the engine stays usable.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/batch_builder.h"
#include "engine/head_runner.h"
#include "engine/metrics.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/selection_runner.h"
#include "engine/speculative.h"
#include "engine/step_arrays.h"
#include "engine/step_graphs.h"
#include "engine/step_shapes.h"
#include "engine/step_times.h"
#include "engine/step_trace.h"
#include "engine/step_traffic.h"
#include "engine/throughput.h"
#include "kv/kv_storage.h"
#include "model/model.h"
#include "tensor/workspace.h"

namespace nb::engine {

struct EngineOptions {
  std::optional<quant::KvFormat> kv_format{};  ///< none: the model's default for its backend
  int max_model_len = 0;                       ///< tokens of one sequence; 0 = as many as the model has positions
  int max_num_seqs = 16;
  int max_batch_tokens = 512;
  int max_waiting = 0;              ///< requests beyond max_num_seqs that may wait; 0 = any number
  std::int64_t kv_cache_bytes = 0;  ///< 0 = see KvBudget; those of a draft model are among them
  std::vector<TokenId> eos_ids{};   ///< tokens that end a sequence, not included in its output
  bool enable_prefix_caching = true;
  std::string trace_path{};         ///< file for a trace of the steps, see StepTrace; empty: none
  std::string kv_store_path{};      ///< directory of KV that outlives the engine, see DiskTier; empty: none
  std::int64_t kv_store_bytes = 0;  ///< of all files in it; must be given with a path
  Digest kv_store_fingerprint{};    ///< the identity of the model's content: kept KV serves no other model
  std::optional<SpeculativeOptions> speculative{};  ///< guesses coming tokens; none: does not
  bool enforce_eager = false;  ///< on a device: start kernels one by one, never a recorded step (StepGraphs)
  bool cascade = true;         ///< read what sequences share once a step; no result depends on it, off is for measuring
};

/// Where the tokens of a prompt came from; they add up to its length.
struct ReuseReport {
  ReuseMode mode = ReuseMode::exact;  ///< that was served: `exact` also where the others have nothing to approximate
  int exact_prefix = 0;               ///< taken from the prefix cache or a sibling
  int isolated = 0;                   ///< taken from chunks as they are
  int recomputed = 0;                 ///< of chunks, computed again
  int computed = 0;                   ///< others
  bool policy_applied = false;        ///< a token did not see all before it, because of the request's key policy
};

/// What one step did for one answer to a request.
struct StepOutput {
  RequestId request_id = 0;
  int choice = 0;                  ///< which of its n answers
  std::vector<TokenId> token_ids;  ///< new tokens, in order; empty while the prompt is being computed
  FinishReason finish_reason = FinishReason::none;
  std::string error;  ///< with `error`: what was wrong with it; `abort`: what failed, if anything
  ErrorCode error_code = ErrorCode::invalid_argument;  ///< of `error`
  std::vector<sampling::TokenLogprob> logprobs;        ///< if asked for: [token_ids, 1 + logprobs], see score_token()
  std::vector<sampling::TokenLogprob>
      prompt_logprobs;   ///< with the final output: [num_prompt - 1, 1 + prompt_logprobs]
  Buffer prompt_logits;  ///< with the final output, if asked for: f32[num_prompt - first_logits, V]
  int first_logits = 0;  ///< position of their first row: behind the last chunk, or 0
  ReuseReport reuse;
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;  ///< prompt tokens that were not computed, but taken from the prefix cache or a sibling
  int num_drafted = 0;        ///< guesses of tokens that were verified so far
  int num_accepted = 0;       ///< and were right
  RequestMetrics metrics;
};

class DiskTier;

class Engine {
 public:
  /// `model` must outlive the engine, and one engine runs it at a time. Throws invalid_argument naming the option,
  /// out_of_memory with the numbers, or io naming a trace_path that cannot be written or a kv_store_path that cannot be
  /// used. `wake`, if any, is called by other threads, until the destructor ends, when waits_for_load() may have
  /// changed.
  Engine(const model::Model& model, const EngineOptions& options, std::function<void()> wake = {});
  /// As finish_saving() with a few seconds.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Queues a request and returns its id. Throws invalid_argument, overloaded or (no room for prompt_logits)
  /// out_of_memory, and leaves the engine unchanged.
  RequestId submit(Request request);

  /// The first half of submit(), which other threads may call at any time: checks a request and allocates its answers.
  std::vector<std::unique_ptr<Sequence>> prepare(Request request) const;

  /// The second half: queues what prepare() returned under an id larger than all before. Throws overloaded.
  void submit(RequestId id, std::vector<std::unique_ptr<Sequence>> answers);

  /// The next step reports the request with `abort` and gives its blocks back. Unknown ids are ignored.
  void cancel(RequestId id);

  /// Plans, computes and commits one step; returns an output for every answer that took part or ended. After an
  /// exception the requests that were running are reported with `abort` by the next step; waiting ones go on. Where
  /// nothing can be done before KV comes from the store, waits for that first.
  std::vector<StepOutput> step();

  /// The same without waiting.
  std::vector<StepOutput> step_at_once();

  /// Whether the next step would find nothing to do: the last one did not, what it lacks is being read from the store,
  /// and nothing has happened since. May be asked for while the engine does not step.
  bool waits_for_load() const;
  /// When a step is due even so.
  Clock::time_point wait_deadline() const { return wait_deadline_; }

  bool has_work() const { return scheduler_.has_work() || !scheduler_.finished().empty(); }
  EngineStats stats() const;
  /// What of stats() changes without a step; any thread may ask.
  void update_store_stats(EngineStats& stats) const;

  /// As given, with defaults filled in.
  const EngineOptions& options() const { return options_; }
  const model::Model& model() const { return model_; }

  /// Has the system provide a little of the memory that the next blocks will need; false when enough of it is there.
  /// For times without work.
  bool touch_memory_ahead() { return storage_.touch_ahead(kTouchedAheadBytes); }

  /// Whether KV waits to be copied into the store.
  bool has_saves() const { return !scheduler_.saves().empty(); }

  /// Copies a record of it, as every step does; false if there is none or the store has enough to write.
  bool save_next();

  /// Waits until all KV that is to be kept is on disk, at most `time`, and gives up the rest.
  void finish_saving(std::chrono::duration<double> time);

  /// Chunks and cached prefixes, and what may be done with them between two steps.
  const kv::ChunkStore& chunks() const { return scheduler_.chunks(); }
  int num_cached(std::span<const TokenId> tokens, std::string_view salt) { return scheduler_.num_cached(tokens, salt); }
  bool remove_chunk(kv::ChunkId id);  ///< from the store too
  bool pin_chunk(kv::ChunkId id, bool pinned) { return scheduler_.pin_chunk(id, pinned); }

  /// Completes the trace, as the destructor does.
  void end_trace() { trace_.reset(); }

  /// Throws internal if a block is lost or counted wrongly. Called after every step in Debug builds, and in Release
  /// builds by the step that leaves no work.
  void check_invariants() { scheduler_.check_invariants(); }

 private:
  static constexpr std::int64_t kTouchedAheadBytes = 8 << 20;
  static constexpr std::chrono::milliseconds kSavePause{2};
  static constexpr std::chrono::seconds kSaveAtEnd{10};

  std::vector<StepOutput> run_step(Clock::time_point begun);
  ops::ExecContext context();
  void select(const StepPlan& plan);
  void forward(const StepPlan& plan);
  void run_recorded(StepGraphs::Shape shape, const StepPlan& plan, ops::ExecContext& ctx);
  void record_time(const StepPlan& plan, double seconds);
  void update_storage();
  DraftModel* draft_model() { return speculator_ == nullptr ? nullptr : speculator_->draft_model(); }
  std::vector<StepOutput> collect(const StepPlan& plan, Clock::time_point begun);
  void measure(const StepPlan& plan, const EngineStats& before, Clock::time_point begun);
  void recover(ErrorCode code, const char* error, Clock::time_point begun);

  const model::Model& model_;
  EngineOptions options_;
  kv::KvStorage storage_;
  Scheduler scheduler_;
  std::shared_ptr<CachingPool> memory_;
  Workspace workspace_;
  HeadRunner head_;
  SelectionRunner selection_;
  StepArrays arrays_;
  StepGraphs graphs_;  // behind all memory that they use
  StepBatch batch_;
  std::int64_t cascade_saved_ = 0;  // of the present step
  std::vector<TokenId> sampled_;
  StepShapes shapes_;
  StepTimes times_;
  StepTraffic traffic_;
  Throughput throughput_;
  std::unique_ptr<DiskTier> tier_;          // none: nothing is kept
  std::unique_ptr<StepTrace> trace_;        // none: nothing is traced
  std::unique_ptr<Speculator> speculator_;  // none: nothing is guessed
  std::size_t past_growths_ = 0;            // of workspaces given up after an error
  std::uint64_t seen_progress_ = 0;         // of the store's loads, before the last step
  bool was_idle_ = false;                   // the last step found nothing to do but to wait for a load
  Clock::time_point wait_deadline_ = Clock::time_point::max();
  RequestId next_id_ = 1;
  EngineStats stats_;
};

}  // namespace nb::engine
