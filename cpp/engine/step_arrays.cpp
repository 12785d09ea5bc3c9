#include "engine/step_arrays.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>

#include "base/align.h"
#include "ops/ops.h"
#include "tensor/device_memory.h"

namespace nb::engine {

namespace {

constexpr std::size_t kLeastBytes = std::size_t{64} << 10;

/// One array behind the other. Rows and segments of a step that is recorded are as many in every step of its shape.
struct Layout {
  std::size_t rows;         ///< of each of five arrays
  std::size_t logit_rows;   ///< where they begin
  std::size_t segments;     ///< likewise
  std::size_t runs;         ///< likewise
  std::size_t blocks;       ///< likewise; of no fixed size
  std::size_t total_bytes;  ///< of this step

  explicit Layout(const model::StepInputs& in) {
    const auto room = [](std::size_t bytes) { return round_up(bytes, kBufferAlignment); };
    rows = room(in.token_ids.size() * sizeof(std::int32_t));
    logit_rows = 5 * rows;
    segments = logit_rows + rows;  // no more of them than rows
    runs = segments + room(in.segments.size() * sizeof(ops::AttentionSegment));
    blocks = runs + room(static_cast<std::size_t>(StepArrays::run_room(in)) * sizeof(ops::AttentionRun));
    total_bytes = blocks + room(in.blocks.size() * sizeof(std::int32_t));
  }
};

}  // namespace

int StepArrays::run_room(const model::StepInputs& inputs) {
  return static_cast<int>(std::bit_ceil(std::max<std::size_t>(inputs.runs.size(), 1)));
}

bool StepArrays::would_move(const model::StepInputs& inputs) const {
  return memory_ != nullptr && Layout(inputs).total_bytes > buffer_.bytes();
}

void StepArrays::upload(const model::StepInputs& inputs, int head_group, Workspace& workspace) {
  if (memory_ == nullptr) return;
  const Layout layout(inputs);
  if (layout.total_bytes > buffer_.bytes()) {
    buffer_ = Buffer();  // first: the two need not fit side by side
    const std::size_t bytes = std::bit_ceil(std::max(layout.total_bytes, kLeastBytes));
    host_.resize(bytes);
    buffer_ = allocate_on(*memory_, bytes);
  }
  const auto put = [&]<class T>(std::size_t begin, const std::vector<T>& values) {
    if (!values.empty()) std::memcpy(host_.data() + begin, values.data(), values.size() * sizeof(T));
    return static_cast<const void*>(buffer_.data() + begin);
  };
  std::size_t begin = 0;
  for (const auto* array : {&inputs.token_ids, &inputs.positions, &inputs.key_positions, &inputs.slots}) {
    workspace.place(std::span(*array), put(begin, *array));
    begin += layout.rows;
  }
  workspace.place_derived(inputs.segments.data(), put(begin, ops::segments_of_rows(model::plan_of(inputs))));
  put(layout.logit_rows, inputs.logit_rows);
  const std::size_t group = static_cast<std::size_t>(head_group);
  for (std::size_t first = 0; first < inputs.logit_rows.size(); first += group) {
    const std::size_t count = std::min(group, inputs.logit_rows.size() - first);
    workspace.place(std::span(inputs.logit_rows).subspan(first, count),
                    buffer_.data() + layout.logit_rows + first * sizeof(std::int32_t));
  }
  workspace.place(std::span(inputs.segments), put(layout.segments, inputs.segments));
  workspace.place(std::span(inputs.runs), put(layout.runs, inputs.runs));
  workspace.place(std::span(inputs.blocks), put(layout.blocks, inputs.blocks));
  memory_->copy_in(buffer_.data(), host_.data(), layout.total_bytes);
}

}  // namespace nb::engine
