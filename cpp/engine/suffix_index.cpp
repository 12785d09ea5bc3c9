#include "engine/suffix_index.h"

namespace nb::engine {

namespace {

constexpr int kRoot = 0;
constexpr int kMostCounted = 32;  // states, for each token
constexpr int kMostEdges = 64;    // looked at for a guess, the newest ones
constexpr int kLeastShare = 5;    // a guess followed at least once in so many times

std::uint64_t key_of(int state, TokenId token) {
  return static_cast<std::uint64_t>(state) << 32 | static_cast<std::uint32_t>(token);
}

}  // namespace

SuffixIndex::SuffixIndex() { add_state(0); }

int SuffixIndex::find(int from, TokenId token) const {
  const auto found = edge_of_.find(key_of(from, token));
  return found == edge_of_.end() ? -1 : edges_[static_cast<std::size_t>(found->second)].target;
}

int SuffixIndex::add_state(int length) {
  states_.push_back({.length = length});
  return static_cast<int>(states_.size()) - 1;
}

void SuffixIndex::add_edge(int from, TokenId token, int target) {
  edge_of_[key_of(from, token)] = static_cast<int>(edges_.size());
  edges_.push_back({.token = token, .target = target, .next = state(from).edges});
  state(from).edges = static_cast<int>(edges_.size()) - 1;
}

void SuffixIndex::push(TokenId token) {
  ++size_;
  const int added = add_state(state(last_).length + 1);
  int parent = last_;
  for (; parent >= 0 && find(parent, token) < 0; parent = state(parent).link) add_edge(parent, token, added);
  if (parent < 0) {
    state(added).link = kRoot;
  } else {
    const int child = find(parent, token);
    const bool fits = state(child).length == state(parent).length + 1;
    state(added).link = fits ? child : split(parent, child, token);
  }
  last_ = added;
  count_from(added);
}

/// Makes a state of its own of the shorter parts of `child`, which now end at more places; returns it.
int SuffixIndex::split(int parent, int child, TokenId token) {
  const int shorter = add_state(state(parent).length + 1);
  state(shorter).link = state(child).link;
  state(shorter).count = state(child).count;
  std::vector<int> edges;  // oldest first
  for (int edge = state(child).edges; edge >= 0; edge = edges_[static_cast<std::size_t>(edge)].next) {
    edges.push_back(edge);
  }
  for (auto edge = edges.rbegin(); edge != edges.rend(); ++edge) {
    const Edge copied = edges_[static_cast<std::size_t>(*edge)];
    add_edge(shorter, copied.token, copied.target);
  }
  state(child).link = shorter;
  for (; parent >= 0 && find(parent, token) == child; parent = state(parent).link) {
    edges_[static_cast<std::size_t>(edge_of_.at(key_of(parent, token)))].target = shorter;
  }
  return shorter;
}

/// The text's last token is one more place for every part that ends there.
void SuffixIndex::count_from(int last) {
  int counted = 0;
  for (int at = last; at > kRoot && counted < kMostCounted; at = state(at).link, ++counted) ++state(at).count;
}

int SuffixIndex::match_length() const { return last_ == kRoot ? 0 : state(state(last_).link).length; }

void SuffixIndex::guess(int most, std::vector<TokenId>& out) const {
  if (last_ == kRoot) return;
  int at = state(last_).link;
  for (int num_guessed = 0; num_guessed < most;) {
    if (at <= kRoot) return;
    int best = -1, best_count = 0, total = 0, seen = 0;
    for (int edge = state(at).edges; edge >= 0 && seen < kMostEdges; ++seen) {
      const Edge& candidate = edges_[static_cast<std::size_t>(edge)];
      const int count = state(candidate.target).count;
      total += count;
      if (count > best_count) {
        best = edge;
        best_count = count;
      }
      edge = candidate.next;
    }
    if (best < 0) {
      at = state(at).link;  // it is the end of the text: what repeats goes on repeating
      continue;
    }
    if (best_count * kLeastShare < total) return;
    out.push_back(edges_[static_cast<std::size_t>(best)].token);
    at = edges_[static_cast<std::size_t>(best)].target;
    ++num_guessed;
  }
}

}  // namespace nb::engine
