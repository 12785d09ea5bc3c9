// The arrays of a step on a device: copied there in one piece, to places that depend on few numbers of the step.
//
// So a step costs one copy instead of one for each array, and work that was recorded (step_graphs.h) finds the arrays
// of later steps where it found those of its own. Not for arrays that few steps have: key positions, hidden keys,
// policies, summaries and open cells are copied when an operator asks for them. Used by the thread that runs steps.
#pragma once

#include <cstddef>
#include <vector>

#include "model/step_inputs.h"
#include "tensor/allocator.h"
#include "tensor/workspace.h"

namespace nb::engine {

class StepArrays {
 public:
  /// `memory`: of the device; null: the host, where arrays stay where they are and upload() does nothing.
  explicit StepArrays(const DeviceMemory* memory) : memory_(memory) {}

  /// Runs that there is room for in front of the blocks, which come last: with the number of rows and segments all that
  /// places depend on.
  static int run_room(const model::StepInputs& inputs);

  /// Whether upload() would take other memory, and give back what arrays lie in so far.
  bool would_move(const model::StepInputs& inputs) const;

  /// Copies the arrays and tells the workspace where they are, which was reset before. Head rows are found in groups of
  /// `head_group`. Throws out_of_memory, device.
  void upload(const model::StepInputs& inputs, int head_group, Workspace& workspace);

  /// Of both images.
  std::size_t capacity_bytes() const { return buffer_.bytes(); }

 private:
  const DeviceMemory* memory_;
  Buffer buffer_;                // on the device
  std::vector<std::byte> host_;  // what it gets
};

}  // namespace nb::engine
