#include "engine/open_groups.h"

#include <algorithm>

#include "base/error.h"
#include "engine/sequence.h"

namespace nb::engine {

namespace {

/// Whether the tokens begin in a group that has tokens already, and end before it is full.
bool stays_open(int first, int end) { return first % kBlockTokens != 0 && end / kBlockTokens == first / kBlockTokens; }

}  // namespace

void OpenPair::advance(int first, int count) {
  const int end = first + count;
  if (end % kBlockTokens != 0 && !stays_open(first, end)) swapped = !swapped;
}

OpenPairs::OpenPairs(int num_pairs) {
  for (int i = num_pairs - 1; i >= 0; --i) free_.push_back(i);
}

void OpenPairs::take(OpenPair& pair) {
  NB_ASSERT(!pair.is_there() && !free_.empty());
  pair = {.index = free_.back(), .swapped = false};
  free_.pop_back();
}

void OpenPairs::give_back(OpenPair& pair) {
  if (pair.is_there()) free_.push_back(pair.index);
  pair = {};
}

void add_open_rows(const Sequence& sequence, int first, int count, bool seals_rest, model::StepInputs& inputs) {
  const int end = first + count;
  for (int own = first; own < end;) {
    const int group = own / kBlockTokens;
    const int next = std::min(end, (group + 1) * kBlockTokens);
    const bool is_full = next % kBlockTokens == 0;
    int cell;
    if (own % kBlockTokens != 0) {
      cell = sequence.open.current();
    } else if (is_full || seals_rest) {
      cell = ~inputs.num_step_cells++;
    } else {
      cell = sequence.open.next();
    }
    NB_ASSERT(cell < 0 || sequence.open.is_there());
    if (is_full || seals_rest) {
      const int block = sequence.table.slot_of(own) / kBlockTokens;
      inputs.seals.push_back({.block = block, .cell = cell, .num_tokens = next - group * kBlockTokens});
    }
    for (; own < next; ++own) {
      inputs.open_cells.push_back(cell);
      inputs.open_groups.push_back(group);
    }
  }
}

}  // namespace nb::engine
