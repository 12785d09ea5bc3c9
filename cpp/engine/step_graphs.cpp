#include "engine/step_graphs.h"

#include <algorithm>

#include "base/log.h"
#include "engine/step_arrays.h"
#include "ops/ops.h"

namespace nb::engine {

namespace {

/// `counts` + `sign` * `other`.
ops::FusionCounts sum(ops::FusionCounts counts, const ops::FusionCounts& other, int sign) {
  for (const ops::FusedOp op : ops::kFusedOps) {
    counts.fused[op] += sign * other.fused[op];
    counts.composed[op] += sign * other.composed[op];
  }
  return counts;
}

/// Whether each segment is one row that draws one token, and rows read nothing but blocks in their order.
bool is_plain_decode(const StepBatch& batch) {
  const model::StepInputs& in = batch.inputs;
  const bool has_more = !in.run_positions.empty() || !in.hidden.empty() || !in.policies.empty() ||
                        !in.summaries.empty() || !in.open_cells.empty() || !in.seals.empty() || in.num_step_cells > 0;
  const auto is_row = [](const ops::AttentionSegment& segment) { return segment.row_count == 1; };
  const auto is_draw = [](const LogitUse& use) { return use.samples && use.draft == 0; };
  const auto is_plain = [](const ops::AttentionRun& run) { return run.score_bias == 0.0f; };
  return !has_more && in.logit_rows.size() == in.token_ids.size() &&
         std::all_of(in.segments.begin(), in.segments.end(), is_row) &&
         std::all_of(in.runs.begin(), in.runs.end(), is_plain) &&
         std::all_of(batch.logit_uses.begin(), batch.logit_uses.end(), is_draw);
}

}  // namespace

std::optional<StepGraphs::Shape> StepGraphs::shape_of(const StepBatch& batch, int max_rows) const {
  const model::StepInputs& in = batch.inputs;
  if (memory_ == nullptr || in.num_tokens() == 0 || in.num_tokens() > max_rows || !is_plain_decode(batch)) return {};
  return Shape{.rows = in.num_tokens(),
               .run_room = StepArrays::run_room(in),
               .splits = ops::count_splits(model::plan_of(in)).of_all};
}

StepGraphs::Entry* StepGraphs::find(const Shape& shape) {
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.shape == shape; });
  return found == entries_.end() ? nullptr : &*found;
}

void StepGraphs::remember(const Shape& shape) {
  if (entries_.size() == kMostShapes) {
    const auto oldest = std::min_element(entries_.begin(), entries_.end(),
                                         [](const Entry& a, const Entry& b) { return a.last_used < b.last_used; });
    if (oldest->graph != nullptr) memory_->delete_graph(oldest->graph);
    entries_.erase(oldest);
  }
  entries_.push_back({.shape = shape, .last_used = ++clock_});
}

bool StepGraphs::run(const Shape& shape, const std::function<void()>& work, ops::FusionCounts& counts) {
  Entry* const entry = find(shape);
  if (entry == nullptr) {
    work();
    remember(shape);
    return false;
  }
  entry->last_used = ++clock_;
  if (entry->graph == nullptr && !entry->failed) record(*entry, work, counts);
  if (entry->graph == nullptr) {
    work();
    return false;
  }
  memory_->replay(entry->graph);
  counts = sum(counts, entry->counts, 1);
  ++replayed_;
  return true;
}

/// Leaves entry.graph empty where it cannot be had; `counts` stays as it was.
void StepGraphs::record(Entry& entry, const std::function<void()>& work, ops::FusionCounts& counts) {
  const ops::FusionCounts before = counts;
  entry.failed = true;
  if (memory_->begin_recording()) {
    bool done = false;
    try {
      work();
      done = true;
    } catch (const std::exception& error) {
      // If it has nothing to do with recording, it comes again at once.
      log(LogLevel::debug, "a step could not be recorded: ", error.what());
    }
    void* const graph = memory_->end_recording();
    if (done) entry.graph = graph;
    if (!done && graph != nullptr) memory_->delete_graph(graph);
  }
  entry.counts = sum(counts, before, -1);
  counts = before;
  entry.failed = entry.graph == nullptr;
  if (!entry.failed) {
    ++recorded_;
    return;
  }
  log(LogLevel::warning, "steps of ", entry.shape.rows, " rows and ", entry.shape.splits,
      " splits could not be recorded; their kernels are started one by one");
}

void StepGraphs::drop() {
  for (const Entry& entry : entries_) {
    if (entry.graph != nullptr) memory_->delete_graph(entry.graph);
  }
  entries_.clear();
}

}  // namespace nb::engine
