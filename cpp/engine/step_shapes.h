// Remembers the shapes of past steps, to assert that a step no larger than one of them takes no new memory.
//
// Only Debug builds ask. Not for planning. Used by the thread that runs steps.
#pragma once

#include <array>
#include <cstddef>

#include "engine/batch_builder.h"

namespace nb::engine {

class StepShapes {
 public:
  /// True if an earlier step was at least as large in every number that memory can depend on. Remembers the step.
  /// `logits_rows`: rows of the largest group that needed logits.
  bool seen_at_least(const StepBatch& batch, int logits_rows);

  void forget() { past_ = {}; }

 private:
  using Shape = std::array<int, 14>;
  static Shape shape_of(const StepBatch& batch, int logits_rows);

  std::array<Shape, 16> past_{};
  std::size_t next_ = 0;
};

}  // namespace nb::engine
