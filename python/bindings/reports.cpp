// What a model and an engine report about themselves, as dictionaries.
#include "base/error.h"
#include "base/ids.h"
#include "bindings.h"
#include "engine/engine.h"
#include "engine/kv_selftest.h"
#include "quant/kv_format.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

// The sum under its name, and each operator behind it.
void add_counts(py::dict& out, const std::string& name, const ops::PerFusedOp<std::int64_t>& counts) {
  std::int64_t sum = 0;
  for (const ops::FusedOp op : ops::kFusedOps) {
    out[py::str(concat(name, "_", ops::to_string(op)))] = counts[op];
    sum += counts[op];
  }
  out[py::str(name)] = sum;
}

double ratio(std::int64_t part, std::int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0.0;
}

// Keys and values of running sequences, a row for each kind of them.
py::list kv_requests(const engine::EngineStats& stats) {
  py::list out;
  for (std::size_t i = 0; i < stats.kv_use.size(); ++i) {
    const engine::KvUse& use = stats.kv_use[i];
    py::dict row;
    row["kv_dtype"] = quant::to_string(stats.kv_format);
    row["kv_policy"] = engine::kKvPolicyNames[i];
    row["running"] = use.sequences;
    row["blocks"] = use.blocks;
    row["bytes"] = use.blocks * stats.block_bytes;
    row["largest_bytes"] = use.largest * stats.block_bytes;
    out.append(std::move(row));
  }
  return out;
}

}  // namespace

py::dict to_dict(const model::FusionPlan& plan) {
  py::dict operators;
  for (const ops::FusedOp op : ops::kFusedOps) operators[ops::to_string(op)] = plan.fused[op] ? "fused" : "composed";
  py::list errors;
  for (const model::FusionError& error : plan.errors) {
    py::dict row;
    row["operator"] = ops::to_string(error.op);
    row["quantity"] = error.quantity;
    row["error"] = error.error;
    row["bound"] = error.bound;
    row["layer"] = error.layer < 0 ? py::object(py::none()) : py::int_(error.layer);
    errors.append(std::move(row));
  }
  py::dict out;
  out["asked"] = model::to_string(plan.asked);
  out["operators"] = std::move(operators);
  out["errors"] = std::move(errors);
  out["seconds"] = plan.seconds;
  return out;
}

py::dict to_dict(const engine::EngineStats& stats) {
  py::dict out;
  out["running"] = stats.running;
  out["waiting"] = stats.waiting;
  out["blocks_total"] = stats.blocks_total;
  out["blocks_free"] = stats.blocks_free;
  out["blocks_owned"] = stats.blocks_owned;
  out["blocks_cached"] = stats.blocks_cached;
  out["prefix_hit_tokens"] = stats.prefix_hit_tokens;
  out["forked_tokens"] = stats.forked_tokens;
  out["disk_hit_tokens"] = stats.disk_hit_tokens;
  out["disk_hit_chunks"] = stats.disk_hit_chunks;
  out["disk_hits"] = stats.disk.hits;
  std::int64_t misses = 0, failures = 0;
  for (int i = 0; i < static_cast<int>(kv::MissReason::count); ++i) {
    const auto reason = static_cast<kv::MissReason>(i);
    out[py::str(concat("disk_misses_", to_string(reason)))] = stats.disk.missed(reason);
    misses += stats.disk.missed(reason);
  }
  out["disk_misses"] = misses;
  out["disk_read_bytes"] = stats.disk.bytes_read;
  out["disk_load_seconds"] = stats.disk_load_seconds;
  out["disk_writes"] = stats.disk.writes;
  out["disk_written_bytes"] = stats.disk.bytes_written;
  for (int i = 0; i < static_cast<int>(kv::WriteFailure::count); ++i) {
    const auto reason = static_cast<kv::WriteFailure>(i);
    out[py::str(concat("disk_write_failures_", to_string(reason)))] = stats.disk.failed(reason);
    failures += stats.disk.failed(reason);
  }
  out["disk_write_failures"] = failures;
  out["disk_saves_dropped"] = stats.disk_saves_dropped;
  out["disk_evictions"] = stats.disk.evictions;
  out["disk_damaged_removed"] = stats.disk.damaged_removed;
  out["disk_records"] = stats.disk.records;
  out["disk_foreign_records"] = stats.disk.foreign_records;
  out["disk_bytes"] = stats.disk.bytes;
  out["disk_waiting_bytes"] = stats.disk.waiting_bytes;
  out["weight_budget_bytes"] = stats.weights.budget_bytes;
  out["weight_resident_bytes"] = stats.weights.resident_bytes;
  out["streamed_layers"] = stats.weights.layers;
  out["streamed_direct"] = stats.weights.direct;
  out["streamed_reads"] = stats.weights.reads;
  out["streamed_bytes"] = stats.weights.read_bytes;
  out["streamed_seconds"] = stats.weights.read_seconds;
  out["streamed_wait_seconds"] = stats.weights.wait_seconds;
  out["streamed_gb_per_s"] = stats.weights.gb_per_s();
  out["streamed_errors"] = stats.weights.errors;
  out["chunks"] = stats.chunks;
  out["chunk_blocks"] = stats.chunk_blocks;
  out["chunk_hits"] = stats.chunk_hits;
  out["chunk_misses"] = stats.chunk_misses;
  out["chunk_evictions"] = stats.chunk_evictions;
  out["measured_tokens"] = stats.measured_tokens;
  out["cascade_saved_tokens"] = stats.cascade_saved_tokens;
  out["preemptions"] = stats.preemptions;
  out["kv_bytes"] = stats.kv_bytes;
  out["kv_block_bytes"] = stats.block_bytes;
  out["kv_bytes_per_token"] = static_cast<double>(stats.block_bytes) / kBlockTokens;
  out["kv_requests"] = kv_requests(stats);
  out["workspace_bytes"] = stats.workspace_bytes;
  out["steps"] = stats.steps;
  out["plan_seconds"] = stats.plan_seconds;
  out["forward_seconds"] = stats.forward_seconds;
  out["sample_seconds"] = stats.sample_seconds;
  out["drawn_on_device"] = stats.drawn_on_device;
  out["graphs_recorded"] = stats.graphs_recorded;
  out["graph_steps"] = stats.graph_steps;
  add_counts(out, "fused_ops", stats.ops.fused);
  add_counts(out, "composed_ops", stats.ops.composed);
  out["num_drafts"] = stats.drafts.drafts;
  out["draft_tokens"] = stats.drafts.drafted;
  out["accepted_draft_tokens"] = stats.drafts.accepted;
  out["draft_acceptance"] = ratio(stats.drafts.accepted, stats.drafts.drafted);
  out["tokens_per_decode"] = stats.drafts.steps > 0 ? 1.0 + ratio(stats.drafts.accepted, stats.drafts.steps) : 0.0;
  out["draft_saved_seconds"] = stats.drafts.saved_seconds;
  out["draft_model_seconds"] = stats.drafts.model_seconds;
  out["draft_model_tokens"] = stats.drafts.model_tokens;
  out["draft_kv_bytes"] = stats.drafts.model_kv_bytes;
  out["generated_tokens"] = stats.generated_tokens;
  out["prompt_tokens"] = stats.prompt_tokens;
  out["read_bytes"] = stats.read_bytes;
  out["tokens_per_s"] = stats.tokens_per_s;
  out["read_gb_per_s"] = stats.read_gb_per_s;
  out["recent_tokens_per_s"] = stats.recent_tokens_per_s;
  out["recent_read_gb_per_s"] = stats.recent_read_gb_per_s;
  return out;
}

py::dict reuse_of(const engine::StepOutput& output) {
  py::dict out;
  out["mode"] = to_string(output.reuse.mode);
  out["exact_prefix"] = output.reuse.exact_prefix;
  out["isolated"] = output.reuse.isolated;
  out["recomputed"] = output.reuse.recomputed;
  out["computed"] = output.reuse.computed;
  out["policy_applied"] = output.reuse.policy_applied;
  return out;
}

py::dict metrics_of(const engine::StepOutput& output) {
  py::dict out;
  out["queue_ms"] = output.metrics.queue_ms;
  out["ttft_ms"] = output.metrics.ttft_ms;
  out["total_ms"] = output.metrics.total_ms;
  out["tokens_per_s"] = output.metrics.tokens_per_s;
  out["num_draft_tokens"] = output.num_drafted;
  out["num_accepted_tokens"] = output.num_accepted;
  return out;
}

py::dict to_dict(const engine::KvSelftest& found) {
  py::dict out;
  out["kl"] = found.mean_kl;
  out["floor_kl"] = found.floor_kl;
  out["cost"] = found.cost();
  out["worst_kl"] = found.worst_kl;
  out["agreement"] = found.agreement;
  out["tokens"] = found.num_tokens;
  out["positions"] = found.num_positions;
  out["seconds"] = found.seconds;
  return out;
}

}  // namespace nb::bindings
