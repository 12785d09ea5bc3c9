// How much of prompts a step may compute while others wait for their next token: from the times of past steps.
//
// A step with prompt rows should take at most stretch() times one without: kLongest while one waits, or one for every
// four that stream; then (stretch - 1) * streaming is in proportion to those who wait, up to kLongestEver, where
// prompts have three quarters of the time: more would hardly shorten what is waited. A prompt row costs its share of
// the matrix products, and one more share for each key it attends to: far into a long prompt that is most of it. Both
// are learnt. What a step without prompts takes changes too, as contexts grow and requests come and go, and cannot be
// seen beside prompts: so every kProbeEvery-th step has none. In between, a sequence that decodes is taken to cost what
// a prompt row costs. The first row of a step costs more than the others, since the keys it attends to must be read
// whoever needs them; a share of a step seen with one row is too much for two. So rows are rounded, not cut off:
// where 1.8 seem to be allowed there will be two, then perhaps three. Only the slicing of prompts follows from it,
// never a token, since results do not depend on slices. Used by the thread that runs steps.
#pragma once

#include "engine/scheduler.h"

namespace nb::engine {

class StepTimes {
 public:
  static constexpr double kLongest = 1.7;         ///< times a step that only decodes, while few wait
  static constexpr double kLongestEver = 4.0;     ///< the same, however many wait
  static constexpr double kFew = 0.25;            ///< of those who stream
  static constexpr int kFirstRows = 64;           ///< before anything is known, of a prompt without context
  static constexpr double kFirstKeyShare = 1e-3;  ///< cost of a key, in rows without context, before it is known
  static constexpr double kMostKeyShare = 1e-2;   ///< and at most
  static constexpr int kProbeEvery = 16;
  static constexpr int kFewestRowsAlone = 64;  ///< a step of fewer prompt rows and nothing else says little

  /// What a step took: rows of sequences that decode, rows of prompts, the keys that these attend to (summed over the
  /// rows), seconds.
  void record(int decode_rows, int prompt_rows, double prompt_keys, double seconds);

  /// How many times as long as a step without prompts one with them may take.
  static double stretch(Demand demand);

  /// What the prompts of the next step may weigh, if anything decodes; nothing if it is time for a step without them.
  PromptBudget prompt_budget(Demand demand) const;

 private:
  double key_share() const;
  double decode_seconds(int rows) const;

  /// Of the cost of a row over the keys it attends to: sums that forget half in about 350 steps, long enough to hold
  /// rows with few keys and with many.
  struct Moments {
    double weight = 0.0;
    double keys = 0.0;
    double seconds = 0.0;
    double keys_keys = 0.0;
    double keys_seconds = 0.0;
  };

  double decode_seconds_ = 0.0;  // of a step that only decodes; 0: not known yet
  int decode_rows_ = 0;          // with so many rows
  int num_mixed_ = 0;            // steps with both since the last that only decoded
  double row_seconds_ = 0.0;     // of a prompt row without context; 0: not known yet
  double last_keys_ = 0.0;       // that a prompt row of the last step with some attended to
  Moments moments_;
};

}  // namespace nb::engine
