// Every part of a text, so that the longest one that ends it and occurred before is known at once, and what followed it
// how often: a suffix automaton, which grows with the text.
//
// A state stands for parts that end at the same places; its edges are the tokens that followed them. A token costs a
// bounded time on average (Blumer et al. 1985), whatever the text. Counts of parts that are much shorter than the
// longest repeated one fall behind, since only the longest are counted at each token. One thread uses an index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/ids.h"

namespace nb::engine {

class SuffixIndex {
 public:
  SuffixIndex();

  /// Adds the next token of the text.
  void push(TokenId token);

  std::size_t size() const { return size_; }

  /// The number of last tokens that occurred before, as they are, anywhere: all of them may be longer than that by one.
  int match_length() const;

  /// Appends at most `most` tokens: what followed the longest match most often, of equals the newest; then what
  /// followed that. Ends early where no token followed often enough.
  void guess(int most, std::vector<TokenId>& out) const;

 private:
  struct State {
    int length = 0;  // of the longest part
    int link = -1;   // the state of its longest ending that ends at more places
    int count = 0;   // places, counted
    int edges = -1;  // the newest edge
  };
  struct Edge {
    TokenId token;
    int target;
    int next;  // older, or -1
  };

  State& state(int index) { return states_[static_cast<std::size_t>(index)]; }
  const State& state(int index) const { return states_[static_cast<std::size_t>(index)]; }
  int find(int from, TokenId token) const;
  int add_state(int length);
  void add_edge(int from, TokenId token, int target);
  int split(int parent, int child, TokenId token);
  void count_from(int last);

  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::unordered_map<std::uint64_t, int> edge_of_;  // by state and token
  int last_ = 0;
  std::size_t size_ = 0;
};

}  // namespace nb::engine
