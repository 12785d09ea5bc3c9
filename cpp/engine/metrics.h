// Counters of the engine and times of a request: what stats() and outputs report.
//
// Not for decisions: nothing here influences a plan or a token. Used by the thread that runs steps.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>

#include "kv/disk_store.h"
#include "model/layer_stream.h"
#include "ops/fusion.h"
#include "quant/format_id.h"

namespace nb::engine {

using Clock = std::chrono::steady_clock;

/// When things happened to one answer.
struct RequestTimes {
  Clock::time_point submitted{};
  Clock::time_point deadline = Clock::time_point::max();
  std::optional<Clock::time_point> first_planned{};
  std::optional<Clock::time_point> first_token{};
  std::optional<Clock::time_point> last_token{};  ///< the newest one
};

/// Milliseconds since submission; what has not happened yet counts up to now.
struct RequestMetrics {
  double queue_ms = 0.0;  ///< until the first step it took part in
  double ttft_ms = 0.0;   ///< until the first token; total_ms for a request without output
  double total_ms = 0.0;  ///< until now
  /// Output tokens after the first, per second between the first and the newest; 0 with fewer than two, or if all of
  /// them came in one step.
  double tokens_per_s = 0.0;
};

inline double milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

inline RequestMetrics metrics_at(const RequestTimes& times, int num_generated, Clock::time_point now) {
  RequestMetrics metrics{.queue_ms = milliseconds(times.first_planned.value_or(now) - times.submitted),
                         .ttft_ms = milliseconds(times.first_token.value_or(now) - times.submitted),
                         .total_ms = milliseconds(now - times.submitted)};
  if (num_generated > 1 && times.last_token > times.first_token) {
    metrics.tokens_per_s = 1e3 * (num_generated - 1) / milliseconds(*times.last_token - *times.first_token);
  }
  return metrics;
}

/// The kinds of running sequences: by the rule of their KV policy (ops::KeyRule, in its order), and those that keep
/// none.
inline constexpr std::array<const char*, 7> kKvPolicyNames{"full",   "window",  "strided", "block",
                                                           "budget", "summary", "none"};

/// Blocks that running sequences of one kind own now, their own and those of summaries. One that several share counts
/// for each of them; those of chunks that they read belong to the chunks.
struct KvUse {
  int sequences = 0;
  std::int64_t blocks = 0;
  std::int64_t largest = 0;  ///< of one sequence

  void add(std::int64_t of_sequence) {
    ++sequences;
    blocks += of_sequence;
    largest = of_sequence > largest ? of_sequence : largest;
  }
};

/// What drafts of coming tokens have done.
struct DraftCounters {
  std::int64_t drafts = 0;     ///< times that tokens of a sequence were verified, one or more at once
  std::int64_t drafted = 0;    ///< tokens that were verified
  std::int64_t accepted = 0;   ///< and were right
  std::int64_t steps = 0;      ///< with and without drafts; one counts once for each sequence that decodes in it
  double saved_seconds = 0.0;  ///< estimated, from what steps of so many rows take: may be negative
  // Of a draft model.
  double model_seconds = 0.0;       ///< in which it ran
  std::int64_t model_tokens = 0;    ///< that it read, prompts and guesses
  std::int64_t model_kv_bytes = 0;  ///< reserved for its keys and values
};

/// The engine's counters since it was made, and its state now.
struct EngineStats {
  int running = 0;
  int waiting = 0;
  int blocks_total = 0;
  int blocks_free = 0;
  int blocks_owned = 0;
  int blocks_cached = 0;                  ///< kept for the prefix cache, given away when others need them
  std::int64_t prefix_hit_tokens = 0;     ///< tokens taken from the prefix cache instead of being computed
  std::int64_t forked_tokens = 0;         ///< prompt tokens shared with another answer to the same prompt
  std::int64_t disk_hit_tokens = 0;       ///< tokens whose KV came from the store
  std::int64_t disk_hit_chunks = 0;       ///< chunks whose KV came from the store
  std::int64_t disk_saves_dropped = 0;    ///< sequences and chunks not kept, since others needed their blocks
  double disk_load_seconds = 0.0;         ///< in which steps waited for the store
  kv::DiskStoreStats disk{};              ///< of the store itself
  model::StreamStats weights{};           ///< of layers that do not stay in memory
  int chunks = 0;                         ///< there, or being computed
  int chunk_blocks = 0;                   ///< that they take
  std::int64_t chunk_hits = 0;            ///< chunks that a request wanted and found
  std::int64_t chunk_misses = 0;          ///< chunks that a request wanted and were not in memory
  std::int64_t chunk_evictions = 0;       ///< chunks that went because others needed the room
  std::int64_t measured_tokens = 0;       ///< tokens of chunks whose deviation was measured
  std::int64_t cascade_saved_tokens = 0;  ///< KV tokens that steps did not read again for sequences that share them
  std::int64_t preemptions = 0;           ///< sequences that gave their blocks back and were computed again
  std::int64_t kv_bytes = 0;              ///< reserved; resident only where blocks were used
  std::int64_t block_bytes = 0;           ///< that one block takes in there, over all layers
  quant::KvFormat kv_format{};            ///< of all blocks
  std::array<KvUse, kKvPolicyNames.size()> kv_use{};  ///< of the sequences that run
  std::int64_t workspace_bytes = 0;
  std::int64_t workspace_growths = 0;  ///< times a step asked for memory; constant once warm
  std::int64_t steps = 0;              ///< forward passes that completed
  double plan_seconds = 0.0;           ///< plan (a draft model's guesses are made there), batch building, commit
  double forward_seconds = 0.0;        ///< decoder and head
  double sample_seconds = 0.0;         ///< drawing tokens and scoring prompts
  std::int64_t drawn_on_device = 0;    ///< tokens that a device drew where their logits were
  std::int64_t graphs_recorded = 0;    ///< shapes of steps that a device kept the work of
  std::int64_t graph_steps = 0;        ///< steps whose kernels it started at once, from what was kept
  ops::FusionCounts ops{};             ///< calls of operators, by the form they took
  DraftCounters drafts{};              ///< where the engine speculates
  std::int64_t generated_tokens = 0;   ///< output tokens reported
  std::int64_t prompt_tokens = 0;      ///< prompt tokens computed
  std::int64_t read_bytes = 0;         ///< weights, keys and values that the steps had to read; see StepTraffic
  double tokens_per_s = 0.0;           ///< generated, per second in which there was work
  double read_gb_per_s = 0.0;          ///< read_bytes / 10^9 per second of forward pass
  double recent_tokens_per_s = 0.0;    ///< as above, over the last Throughput::kWindowSteps steps
  double recent_read_gb_per_s = 0.0;
};

}  // namespace nb::engine
