// Work of whole steps, recorded once and then started with one call: which shapes of steps there are graphs of.
//
// A graph holds the arguments of its kernels, so it serves every step in which these are the same: a Shape. Only steps
// in which each sequence has one row and draws one token have one; all others are started kernel by kernel. A shape is
// recorded when it comes for the second time: by then the workspace is large enough and every kernel is loaded. What
// moves memory that steps use must call drop() first. Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "engine/batch_builder.h"
#include "ops/fusion.h"
#include "tensor/device_memory.h"

namespace nb::engine {

class StepGraphs {
 public:
  /// All that arguments of kernels depend on, in one engine.
  struct Shape {
    int rows = 0;
    int run_room = 0;  ///< StepArrays::run_room()
    int splits = 0;    ///< ops::SplitCounts::of_all
    bool has_logits = false;

    bool operator==(const Shape&) const = default;
  };

  /// Graphs and other shapes that are remembered; of more, those go that were used longest ago.
  static constexpr std::size_t kMostShapes = 64;

  /// `memory`: null where nothing can be recorded, or nothing is to be.
  explicit StepGraphs(const DeviceMemory* memory) : memory_(memory) {}
  ~StepGraphs() { drop(); }
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  /// The shape of a step, but for has_logits; none if it must be started kernel by kernel. `max_rows`: of one group of
  /// head rows.
  std::optional<Shape> shape_of(const StepBatch& batch, int max_rows) const;

  /// Starts the work of a step of this shape: `work` does, or what it did when it was recorded is started again.
  /// `counts` grows as if `work` had run. Returns whether a graph was started. Throws what `work` throws.
  bool run(const Shape& shape, const std::function<void()>& work, ops::FusionCounts& counts);

  /// Gives all graphs back and forgets all shapes.
  void drop();

  std::int64_t recorded() const { return recorded_; }  ///< graphs, ever
  std::int64_t replayed() const { return replayed_; }  ///< steps that a graph was started for
  std::size_t num_shapes() const { return entries_.size(); }

 private:
  struct Entry {
    Shape shape;
    void* graph = nullptr;
    bool failed = false;          // recording it did; not tried again
    ops::FusionCounts counts{};   // what `work` counts
    std::uint64_t last_used = 0;  // of clock_
  };

  Entry* find(const Shape& shape);
  void remember(const Shape& shape);
  void record(Entry& entry, const std::function<void()>& work, ops::FusionCounts& counts);

  const DeviceMemory* memory_;
  std::vector<Entry> entries_;
  std::uint64_t clock_ = 0;
  std::int64_t recorded_ = 0, replayed_ = 0;
};

}  // namespace nb::engine
