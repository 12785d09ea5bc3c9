// The ordered table of sampling stages: pure functions over a set of candidate tokens.
//
// Order: logit bias, repetition penalty, temperature, min-p, top-k, top-p, draw. Adding a stage is one function and
// one row of the table. Not for stopping rules. A Candidates is used by one thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "sampling/params.h"

namespace nb::sampling {

/// The tokens that may still be drawn, in ascending order of id; logits are finite. Arrays keep their capacity.
class Candidates {
 public:
  /// All tokens of a row of logits: -infinity and NaN are left out, +infinity counts as the largest finite value.
  /// Throws internal if nothing is left.
  void reset(std::span<const float> logits);

  std::size_t size() const { return ids.size(); }
  float max_logit() const;

  /// Index of `token` in the arrays, or -1.
  std::ptrdiff_t find(TokenId token) const;

  /// Keeps candidates i for which `logits[i] > floor`, or `logits[i] == floor` and `ids[i] <= last_id`.
  void keep_from(double floor, TokenId last_id);

  /// The `count` most likely candidates (ties: lower id first) by descending logit, into `ranked`.
  void rank(std::size_t count);

  struct Candidate {
    TokenId id;
    float logit;
  };

  std::vector<TokenId> ids;
  std::vector<float> logits;

  // Scratch of the stages.
  std::vector<double> weights;
  std::vector<double> bins;
  std::vector<Candidate> ranked;
  std::vector<TokenId> distinct;
  std::vector<std::uint8_t> seen;  // by token; all zero between stages
};

/// What a stage may look at.
struct StageInput {
  const SamplingParams& params;
  std::span<const TokenId> tokens;  ///< prompt and output so far
};

struct Stage {
  const char* name;
  bool shapes_greedy;  ///< applies at temperature 0 too
  bool (*active)(const SamplingParams& params);
  void (*apply)(Candidates& candidates, const StageInput& input);
};

/// The table, in the order of application.
std::span<const Stage> stages();

/// The most likely candidate, ties to the lower id.
TokenId pick_greedy(const Candidates& candidates);

/// Inverse of the cumulative distribution, candidates in ascending order of id, at `uniform` in [0, 1).
TokenId draw(Candidates& candidates, double uniform);

}  // namespace nb::sampling
