// What requests want of their next tokens, as rows for a kernel that draws them where the logits lie (ops::SampleArgs).
//
// The rows and all their lists are one piece of bytes, so that one copy brings them to a device. Not for drawing
// (sampler.h). Keeps its memory from step to step; used by one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "ops/args.h"
#include "sampling/sampler.h"

namespace nb::sampling {

class SampleRows {
 public:
  void clear();

  /// Adds a row that draws what Sampler::sample() would; `input.logits` is not looked at. Costs as much time as there
  /// are tokens if the request has penalties.
  void add(const SampleInput& input);

  /// Adds a row for a token that nobody wants: it takes the most likely one.
  void add_unwanted();

  int size() const { return static_cast<int>(rows_.size()); }

  /// Bytes of all rows and lists.
  std::size_t bytes() const { return rows_.size() * sizeof(ops::SampleRow) + lists_.size(); }

  /// The rows and then their lists, as they are to be copied to `base` (aligned to 8), which they point into. Valid
  /// until the next call of anything.
  std::span<const std::byte> packed_for(const void* base);

 private:
  /// Where the lists of a row begin in lists_.
  struct Offsets {
    std::size_t biases, history, masked, allowed;
  };
  template <class T>
  std::size_t put(std::span<const T> values);
  void put_history(const SampleInput& input, ops::SampleRow& row, Offsets& offsets);
  void put_masked(const SampleInput& input, ops::SampleRow& row, Offsets& offsets);
  void put_allowed(const SampleInput& input, ops::SampleRow& row, Offsets& offsets);

  std::vector<ops::SampleRow> rows_;  // without pointers
  std::vector<Offsets> offsets_;
  std::vector<std::byte> lists_;
  std::vector<std::byte> packed_;
  // Of one row, while it is added.
  std::vector<ops::TokenBias> biases_;
  std::vector<ops::TokenCount> history_;
  std::vector<std::int32_t> masked_;
  std::vector<std::uint32_t> allowed_;
  std::vector<std::int32_t> places_;  // by token: 1 + its place in history_; all zero between rows
};

}  // namespace nb::sampling
