// The inner loops of softmax.h over whole blocks, compiled for several instruction sets of x86-64.
//
// One source and no fused multiply-add: every variant does the same operations on the same lanes in the same order, so
// all give the same bits and which one runs is a matter of speed only. Callers use softmax.h. Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace nb::sampling {

/// Logits of one block; the last block of a row may be shorter.
inline constexpr std::size_t kBlockLogits = 64;

/// `logits` are num_blocks * kBlockLogits values, `max` and `scale` as for exp_weights() in softmax.h.
struct RowKernels {
  const char* name;
  /// maxima[b] = the largest logit of block b, NaN ignored; -infinity if there is none.
  void (*maxima)(const float* logits, std::size_t num_blocks, float* maxima);
  void (*weights)(const float* logits, std::size_t num_blocks, float max, float scale, float* weights);
  /// sums[b] = the weights of block b added up: weights i, i + 8, ... one after the other for each i < 8, then these
  /// eight as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
  void (*sums)(const float* logits, std::size_t num_blocks, float max, float scale, float* sums);
  /// Bit i says that logit i of one block is at least `floor`; NaN is not.
  std::uint64_t (*reaching)(const float* logits, float floor);
};

/// The variants that this machine can run, slowest first; the first one is plain C++.
std::span<const RowKernels> row_kernels();

}  // namespace nb::sampling
