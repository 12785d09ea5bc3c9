// The emulated kernels as operators on host memory, for tests that know nothing of devices.
//
// For tests only. Under an emulator all memory is the host's, so what walks the tables of the CPU can walk the kernels
// of cuda/ too. Not for a GPU.
#pragma once

#include <algorithm>
#include <vector>

#include "base/align.h"
#include "base/ids.h"
#include "cuda_emulation/device.h"
#include "ops/ops_fixture.h"

namespace nb::cuda {

/// Attention with what ops.cpp says to devices only.
template <bool kDeterministic>
void attend_on_host(const ops::AttentionArgs& args, const Part& part) {
  if (part.index != 0) return;
  ops::AttentionArgs a = args;
  std::vector<std::int32_t> row_segments(static_cast<std::size_t>(a.rows));
  for (int s = 0; s < a.num_segments; ++s) {
    const ops::AttentionSegment& segment = a.segments[s];
    std::fill_n(row_segments.begin() + segment.row_begin, segment.row_count, s);
    int splits = 0;
    for (int r = 0; r < segment.run_count; ++r) {
      splits += ceil_div(a.runs[segment.run_begin + r].num_keys, kSplitTokens);
    }
    a.max_segment_rows = std::max(a.max_segment_rows, segment.row_count);
    a.max_splits = std::max(a.max_splits, splits);
    if (segment.row_count <= ops::kDecodeRows) a.max_decode_splits = std::max(a.max_decode_splits, splits);
  }
  a.row_segments = row_segments.data();
  const ops::Backend& backend = emulation::backend();
  (kDeterministic ? backend.deterministic : backend.kernels)->attention(a, part);
}

/// Operators on host memory by emulated kernels, on one thread. Every row of attention is computed by one block.
struct OnHostBench : ops::Bench {
  explicit OnHostBench(bool deterministic = false) : Bench("reference"), table(*emulation::backend().kernels) {
    table.memory = nullptr;
    table.attention = deterministic ? attend_on_host<true> : attend_on_host<false>;
    ctx.kernels = &table;
  }
  ops::KernelTable table;
};

}  // namespace nb::cuda
