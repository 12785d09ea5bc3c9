// What an engine measures of its steps and says about itself.
#include <algorithm>

#include "engine/disk_tier.h"
#include "engine/engine.h"

namespace nb::engine {

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  stats.running = scheduler_.num_running();
  stats.waiting = scheduler_.num_waiting();
  stats.blocks_total = scheduler_.pool().num_blocks();
  stats.blocks_free = scheduler_.pool().num_free();
  stats.blocks_owned = scheduler_.pool().num_owned();
  stats.blocks_cached = scheduler_.pool().num_cached();
  stats.prefix_hit_tokens = scheduler_.counters().prefix_hit_tokens;
  stats.chunks = static_cast<int>(scheduler_.chunks().chunks().size());
  stats.chunk_blocks = scheduler_.chunks().num_blocks();
  stats.chunk_hits = scheduler_.chunks().counters().hits;
  stats.chunk_misses = scheduler_.chunks().counters().misses;
  stats.chunk_evictions = scheduler_.chunks().counters().evictions;
  stats.forked_tokens = scheduler_.counters().forked_tokens;
  stats.preemptions = scheduler_.counters().preemptions;
  stats.disk_hit_tokens = scheduler_.counters().restored_tokens;
  stats.disk_hit_chunks = scheduler_.counters().restored_chunks;
  stats.disk_saves_dropped = scheduler_.saves().num_dropped();
  update_store_stats(stats);
  if (speculator_ != nullptr) stats.drafts = speculator_->counters();
  stats.read_bytes = throughput_.read_bytes();
  stats.tokens_per_s = throughput_.total().tokens_per_s;
  stats.read_gb_per_s = throughput_.total().read_gb_per_s;
  stats.recent_tokens_per_s = throughput_.recent().tokens_per_s;
  stats.recent_read_gb_per_s = throughput_.recent().read_gb_per_s;
  stats.kv_bytes = storage_.bytes();
  stats.block_bytes = storage_.bytes() / storage_.num_blocks();
  stats.kv_format = storage_.shape().format;
  stats.kv_use = scheduler_.kv_use();
  stats.workspace_bytes = static_cast<std::int64_t>(workspace_.high_water_bytes());
  stats.workspace_growths = static_cast<std::int64_t>(past_growths_ + workspace_.num_growths());
  return stats;
}

void Engine::update_store_stats(EngineStats& stats) const {
  stats.weights = model_.weights().stream_stats();
  if (tier_ == nullptr) return;
  const DiskTierStats tier = tier_->stats();
  stats.disk = tier.store;
  stats.disk_load_seconds = tier.load_seconds;
}

/// Tells the slicing of prompts what a step took.
void Engine::record_time(const StepPlan& plan, double seconds) {
  int decode_rows = 0;
  double keys = 0.0;
  for (const PlannedSequence& entry : plan.entries) {
    if (entry.selects) continue;
    if (entry.decodes()) {
      decode_rows += entry.count;
    } else {
      const int first = entry.sequence->position_of(entry.first);
      keys += entry.count * (first + 0.5 * (entry.count + 1));
    }
  }
  times_.record(decode_rows, plan.num_tokens - decode_rows, keys, seconds);
  if (speculator_ != nullptr) speculator_->record(plan, sampled_, seconds);
}

/// Speeds, and the trace. `before`: the counters when the step began.
void Engine::measure(const StepPlan& plan, const EngineStats& before, Clock::time_point begun) {
  StepWork work;
  work.generated_tokens = stats_.generated_tokens - before.generated_tokens;
  work.forward_seconds = stats_.forward_seconds - before.forward_seconds;
  if (plan.num_tokens > 0) {
    work.read_bytes = traffic_.bytes(batch_.inputs, HeadRunner::num_groups(batch_.logit_uses.size()), cascade_saved_);
  }
  const Clock::time_point ended = Clock::now();
  throughput_.record(work, begun, ended, scheduler_.has_work());
  if (trace_ == nullptr) return;
  trace_->step({.index = before.steps,
                .rows = plan.num_tokens,
                .prompt_rows = static_cast<int>(stats_.prompt_tokens - before.prompt_tokens),
                .sequences = static_cast<int>(plan.entries.size()),
                .preemptions = scheduler_.counters().preemptions - before.preemptions,
                .running = scheduler_.num_running(),
                .waiting = scheduler_.num_waiting()},
               begun, ended);
}

}  // namespace nb::engine
