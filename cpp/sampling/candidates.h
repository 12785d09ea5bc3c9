// The tokens that may still be drawn, first as a row of logits that stages edit, then as a set that filters shrink.
//
// A row is copied only if a stage changes it, and a filter looks only into blocks of 64 logits whose maximum reaches
// what it keeps. Every filter keeps the front of one order: descending logit, ties by ascending id. Not for the
// order of stages (stages.h). Holds scratch memory that keeps its capacity; used by one thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace nb::sampling {

class Candidates {
 public:
  struct Candidate {
    TokenId id;
    float logit;  ///< before the temperature
  };

  /// Begins with a row, which must stay as it is until the token is drawn. -infinity and NaN mark tokens that cannot be
  /// drawn, +infinity counts as the largest finite value.
  void reset(std::span<const float> row);

  // ---- while editing ----

  std::size_t vocab_size() const { return logits_.size(); }

  /// The logits by token id, to be changed. The first call copies the row.
  std::span<float> edit();

  /// Takes a token out.
  void mask(TokenId token);

  /// A stage that masks puts its name down here, for the message if nothing is left.
  void blame(const char* field);

  /// Ends editing. Throws invalid_argument naming the fields if masks have left nothing, and internal if the row
  /// itself had nothing to draw.
  void settle();

  /// The part of settle() that cannot fail: ends editing. Returns max_logit(), -infinity if there is nothing to draw.
  float find_maxima();

  // ---- afterwards ----

  /// Number of candidates, those that cannot be drawn included until a filter drops them.
  std::size_t size() const { return logits_.size(); }

  /// The candidates in ascending order of id, logits before the temperature.
  std::span<const float> logits() const { return logits_; }
  TokenId id_at(std::size_t index) const { return ids_.empty() ? static_cast<TokenId>(index) : ids_[index]; }

  /// The largest logit; finite.
  float max_logit() const { return max_; }

  /// Divides the distance of every logit from the largest; > 0.
  void set_temperature(double temperature);
  double temperature() const { return temperature_; }

  /// Keeps candidates with a logit above `floor`, or equal to it and an id of at most `last_id`.
  void keep_from(float floor, TokenId last_id);

  /// Keeps the `count` most likely; count >= 1.
  void keep_most_likely(std::size_t count);

  /// Keeps the shortest front whose probabilities sum to at least `share`, in (0, 1); sums are good to 2e-6.
  void keep_share(double share);

  /// The `count` most likely, or all if there are fewer, in descending order. Valid until the next call.
  std::span<const Candidate> most_likely(std::size_t count);

  /// 1 + the number of tokens in front of `token`, while no filter has dropped any; a NaN stands with -infinity.
  std::int32_t rank_of(TokenId token) const;

  /// The most likely candidate.
  TokenId best() const;

  /// Inverse of the cumulative distribution, candidates in ascending order of id, at `uniform` in [0, 1).
  TokenId draw(double uniform);

  /// For stages that count tokens: `counts[token]`, all zero between stages, and room for a list.
  std::vector<std::uint32_t>& counts() { return counts_; }
  std::vector<TokenId>& touched() { return touched_; }

 private:
  std::span<const float> block_at(std::size_t block) const;
  void gather(float floor, std::size_t count);
  double keep_within(double nats);
  float floor_of_most_likely(std::size_t count);

  std::span<const float> logits_;
  std::span<const TokenId> ids_;  // ascending; empty while index and id are the same
  float max_ = 0.0f;
  double temperature_ = 1.0;
  float scale_ = 1.0f;         // 1 / temperature, kept finite and positive
  std::vector<float> maxima_;  // of the blocks of logits_
  std::vector<const char*> blamed_;

  std::vector<float> edited_;
  std::vector<float> kept_logits_;
  std::vector<TokenId> kept_ids_;
  std::vector<float> weights_;  // of blocks or of candidates
  std::vector<float> order_;
  std::vector<double> bins_;
  std::vector<Candidate> ranked_;
  std::vector<std::uint32_t> counts_;
  std::vector<TokenId> touched_;
};

}  // namespace nb::sampling
