// Where the scheduler gets drafts from: guesses of the next tokens of sequences that decode, verified in the same step
// that computes their last token.
//
// No token depends on them, only how many steps an answer takes. Used by the thread that runs steps.
#pragma once

#include <span>

#include "base/ids.h"

namespace nb::engine {

class Sequence;

/// What a source remembers about one sequence, for as long as that lives.
class DraftState {
 public:
  virtual ~DraftState() = default;
};

/// A sequence that decodes in the step being planned.
struct DraftCandidate {
  Sequence* sequence;
  int most;  ///< drafts that it may have, at least 1
};

/// Of the step being planned.
struct DraftRoom {
  int planned_rows;  ///< without drafts
  int free_rows;     ///< for drafts, at least 1
};

class DraftSource {
 public:
  virtual ~DraftSource() = default;

  /// So many drafts of a sequence it stores something of, in the blocks of their places: then those are in use before
  /// it is asked for drafts, and not given for more.
  virtual int num_stored() const { return 0; }

  /// The content of these blocks came from elsewhere: nothing that was stored in them before belongs to it.
  virtual void restored(std::span<const BlockId> /*blocks*/) {}

  /// Sets Sequence::drafts, empty so far, of some candidates: together at most room.free_rows. The scheduler may cut
  /// them.
  virtual void propose(std::span<const DraftCandidate> candidates, DraftRoom room) = 0;
};

}  // namespace nb::engine
