// Where the keys of a step go, of formats that quantize the keys of a block when it is full: which open cell each row
// has, and which blocks are sealed.
//
// The 16 own tokens of a block of a sequence are a group. Groups that begin and end within the step have cells of the
// step; one that is left unfinished has one of the two cells that its sequence keeps while it runs: while one holds
// what a step finishes, the next group begins in the other. Integers only. Used by the thread that runs steps.
#pragma once

#include <vector>

#include "model/step_inputs.h"

namespace nb::engine {

class Sequence;

/// The two cells of a running sequence; none at first.
struct OpenPair {
  int index = -1;  ///< cells 2 * index and 2 * index + 1
  bool swapped = false;

  bool is_there() const { return index >= 0; }
  int current() const { return 2 * index + (swapped ? 1 : 0); }
  int next() const { return 2 * index + (swapped ? 0 : 1); }

  /// Own tokens [first, first + count) are stored.
  void advance(int first, int count);
};

/// Which pairs are free.
class OpenPairs {
 public:
  /// `num_pairs` of them; 0 where the format seals nothing.
  explicit OpenPairs(int num_pairs);

  /// Gives a pair to who has none; there must be one.
  void take(OpenPair& pair);
  /// Takes it back, if there is one.
  void give_back(OpenPair& pair);
  int num_free() const { return static_cast<int>(free_.size()); }

 private:
  std::vector<int> free_;
};

/// Adds the cells and groups of rows for own tokens [first, first + count) of a sequence, and the blocks that they
/// fill. `seals_rest`: the last one too if it is not full, since no token follows that could see its keys open.
void add_open_rows(const Sequence& sequence, int first, int count, bool seals_rest, model::StepInputs& inputs);

}  // namespace nb::engine
