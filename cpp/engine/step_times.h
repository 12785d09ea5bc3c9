// How many prompt rows a step may compute while others wait for their next token: from the times of past steps.
//
// A step with prompt rows should take at most kLongest times one without. Only the slicing of prompts follows from it,
// never a token, since results do not depend on slices. Used by the thread that runs steps.
#pragma once

namespace nb::engine {

class StepTimes {
 public:
  static constexpr double kLongest = 2.5;  ///< times a step that only decodes
  static constexpr int kFewestRows = 16;   ///< a step computes at least this much of a prompt
  static constexpr int kFirstRows = 64;    ///< before anything is known

  /// What a step took: rows of sequences that decode, rows of prompts, seconds.
  void record(int decode_rows, int prompt_rows, double seconds);

  /// The most prompt rows of the next step, if anything decodes.
  int prompt_rows() const;

 private:
  double decode_seconds_ = 0.0;  // of a step that only decodes; 0: not known yet
  double prompt_seconds_ = 0.0;  // of one prompt row; 0: not known yet
};

}  // namespace nb::engine
