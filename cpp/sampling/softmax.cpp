#include "sampling/softmax.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kMaxFinite = std::numeric_limits<float>::max();

using Block = std::array<float, kBlockLogits>;

const RowKernels& kernels() {
  static const RowKernels fastest = row_kernels().back();
  return fastest;
}

/// The short last block, filled up with -infinity, so that it takes the same path as a full one.
Block padded(std::span<const float> tail) {
  Block block;
  block.fill(kMinusInfinity);
  std::copy(tail.begin(), tail.end(), block.begin());
  return block;
}

}  // namespace

float block_maxima(std::span<const float> logits, std::span<float> maxima) {
  NB_ASSERT(maxima.size() == num_blocks(logits.size()));
  const std::size_t full = logits.size() / kBlockLogits;
  kernels().maxima(logits.data(), full, maxima.data());
  if (full < maxima.size()) kernels().maxima(padded(logits.subspan(full * kBlockLogits)).data(), 1, &maxima[full]);
  float best = kMinusInfinity;
  for (const float value : maxima) best = std::max(best, value);
  return std::min(best, kMaxFinite);
}

void exp_weights(std::span<const float> logits, float max, float scale, std::span<float> weights) {
  NB_ASSERT(weights.size() == logits.size());
  const std::size_t full = logits.size() / kBlockLogits;
  kernels().weights(logits.data(), full, max, scale, weights.data());
  const auto tail = logits.subspan(full * kBlockLogits);
  if (tail.empty()) return;
  Block block;
  kernels().weights(padded(tail).data(), 1, max, scale, block.data());
  std::copy_n(block.begin(), tail.size(), weights.last(tail.size()).begin());
}

double exp_sums(std::span<const float> logits, float max, float scale, std::span<float> sums) {
  NB_ASSERT(sums.size() == num_blocks(logits.size()));
  const std::size_t full = logits.size() / kBlockLogits;
  kernels().sums(logits.data(), full, max, scale, sums.data());
  if (full < sums.size()) {
    kernels().sums(padded(logits.subspan(full * kBlockLogits)).data(), 1, max, scale, &sums[full]);
  }
  double total = 0.0;
  for (const float sum : sums) total += static_cast<double>(sum);
  return total;
}

std::uint64_t reaching(std::span<const float> block, float floor) {
  if (block.size() == kBlockLogits) return kernels().reaching(block.data(), floor);
  return kernels().reaching(padded(block).data(), floor);
}

namespace {

/// Calls function(piece, scratch) for pieces of the row; `scratch` has room for what belongs to a block.
template <class Function>
void for_pieces(std::span<const float> logits, const Function& function) {
  constexpr std::size_t kPieceBlocks = 128;
  std::array<float, kPieceBlocks> scratch;
  for (std::size_t begin = 0; begin < logits.size(); begin += kPieceBlocks * kBlockLogits) {
    const auto piece = logits.subspan(begin, std::min(kPieceBlocks * kBlockLogits, logits.size() - begin));
    function(piece, std::span(scratch).first(num_blocks(piece.size())));
  }
}

}  // namespace

double log_sum_exp(std::span<const float> logits) {
  float max = kMinusInfinity;
  for_pieces(logits, [&](auto piece, auto blocks) { max = std::max(max, block_maxima(piece, blocks)); });
  return log_sum_exp(logits, max);
}

double log_sum_exp(std::span<const float> logits, float max) {
  if (max == kMinusInfinity) return std::numeric_limits<double>::quiet_NaN();
  double total = 0.0;
  for_pieces(logits, [&](auto piece, auto blocks) { total += exp_sums(piece, max, 1.0f, blocks); });
  return static_cast<double>(max) + std::log(total);
}

double log_probability(std::span<const float> logits, TokenId token, double log_sum_exp) {
  NB_ASSERT(token >= 0 && static_cast<std::size_t>(token) < logits.size());
  if (std::isnan(log_sum_exp)) return log_sum_exp;
  const float logit = logits[static_cast<std::size_t>(token)];
  if (std::isnan(logit)) return -std::numeric_limits<double>::infinity();
  return static_cast<double>(std::min(logit, kMaxFinite)) - log_sum_exp;
}

}  // namespace nb::sampling
