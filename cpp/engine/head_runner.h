// From hidden rows to tokens and prompt scores: the head in groups of rows, then the sampler.
//
// Groups bound the memory of logits whatever the batch; plain greedy rows take the argmax fused into the head and
// need no logits at all. Where the model runs on a device that can draw tokens, only those of them come to the host
// that a request wants to see, or whose drawing fails. Not for deciding which rows (batch_builder.h). Used by the
// thread that runs steps.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <span>
#include <vector>

#include "engine/batch_builder.h"
#include "engine/metrics.h"
#include "engine/step_trace.h"
#include "model/model.h"
#include "ops/ops.h"
#include "sampling/sample_rows.h"
#include "sampling/sampler.h"

namespace nb::engine {

/// What the token of a sequence behind so many of its drafts depends on, but for logits and what a constraint allows.
sampling::SampleInput sample_input(const Sequence& sequence, int num_drafts);

class HeadRunner {
 public:
  static constexpr int kGroupRows = 32;

  /// `model` must outlive this.
  explicit HeadRunner(const model::Model& model);

  /// Sets the draws of every entry of the plan that samples, from sampled[entry.first_draw] on, as long as its drafts
  /// are right: rows behind a wrong one, or behind a token that ends the sequence, are not drawn. Fills the prompt
  /// scores of its sequences. `hidden` is the decoder's output for batch.inputs. A request whose masks leave no token
  /// gets the message in Sequence::error and its draw stays as it was, and so does one whose constraint fails. A
  /// constraint takes drafts that are right before the row behind them is drawn. Throws internal if a row itself has
  /// nothing to draw from.
  void run(Tensor hidden, const StepBatch& batch, const StepPlan& plan, std::span<TokenId> sampled,
           ops::ExecContext& ctx, EngineStats& stats, StepTrace* trace = nullptr);

  /// Sets the greedy tokens of rows, and their logits unless empty.
  using Head = std::function<void(std::span<const std::int32_t> rows, Tensor logits, std::span<TokenId> argmax)>;

  /// The same with another way to the logits; `phase`: its name in the trace.
  void run(const Head& head, const char* phase, const StepBatch& batch, const StepPlan& plan,
           std::span<TokenId> sampled, ops::ExecContext& ctx, EngineStats& stats, StepTrace* trace);

  /// Groups that so many logit rows make, each of which reads the head once.
  static int num_groups(std::size_t num_rows) { return static_cast<int>((num_rows + kGroupRows - 1) / kGroupRows); }

  /// Rows of the largest group of the last run that needed logits.
  int logits_rows() const { return logits_rows_; }

 private:
  struct Group;
  void draw_on_device(Group& group, ops::ExecContext& ctx, EngineStats& stats);
  void find_allowed_rows(Group& group, const Part& part);
  void copy_to_host(Group& group);
  void finish_rows(const Group& group, const Part& part);
  void finish_row(const Group& group, std::size_t row, std::size_t thread);
  void find_allowed(const Sequence& sequence, std::size_t row);
  sampling::SampleInput describe(const Sequence& sequence, int num_drafts, std::size_t row) const;

  const model::Model& model_;
  std::vector<sampling::Sampler> samplers_;          // one per thread
  std::vector<std::exception_ptr> errors_;           // one per row of a group
  std::vector<std::vector<std::uint32_t>> allowed_;  // one per row of a group: what a constraint allows, a bit a token
  std::vector<float> host_logits_;                   // of a group, where the model runs on a device
  sampling::SampleRows sample_rows_;                 // of a group, for the device
  int logits_rows_ = 0;
};

}  // namespace nb::engine
