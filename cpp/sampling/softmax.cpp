#include "sampling/softmax.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kMaxFinite = std::numeric_limits<float>::max();
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLowestBits = -125.0f;  // 2 to this power is still a normal float
constexpr std::size_t kLanes = 8;

using Block = std::array<float, kBlockLogits>;

/// 2^x with x = (logit - max) * bits: x = n + f with |f| <= 1/2, then the Taylor polynomial of 2^f of degree 6 (it
/// leaves out less than 1.3e-7), and n goes into the exponent. No branch, so that compilers turn a loop of these into
/// vector code; the operations per value are the same either way.
inline float weight(float logit, float max, float bits) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  const float x = ((kMaxFinite < logit ? kMaxFinite : logit) - max) * bits;
  const float bounded = x > kLowestBits ? x : kLowestBits;  // a NaN fails the comparison
  const float shifted = bounded + kRound;
  const float f = bounded - (shifted - kRound);
  float p = 0x1.430912p-13f;  // (ln 2)^k / k! for k = 6 .. 0
  p = p * f + 0x1.5d87fep-10f;
  p = p * f + 0x1.3b2ab6p-7f;
  p = p * f + 0x1.c6b08ep-5f;
  p = p * f + 0x1.ebfbe0p-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  const std::uint32_t value = std::bit_cast<std::uint32_t>(p) + (std::bit_cast<std::uint32_t>(shifted) << 23);
  const std::uint32_t keep = x >= kLowestBits ? ~std::uint32_t{0} : 0;
  return std::bit_cast<float>(value & keep);
}

inline void block_weights(const float* logits, float max, float scale, float* weights) {
  const float bits = scale * kLog2E;
  for (std::size_t i = 0; i < kBlockLogits; ++i) weights[i] = weight(logits[i], max, bits);
}

inline float block_sum(const float* logits, float max, float scale) {
  const float bits = scale * kLog2E;
  std::array<float, kLanes> lanes{};
  for (std::size_t i = 0; i < kBlockLogits; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += weight(logits[i + lane], max, bits);
  }
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

inline float block_max(const float* logits) {
  std::array<float, kLanes> best;  // lanes, so that comparisons need not wait for each other
  best.fill(kMinusInfinity);
  for (std::size_t i = 0; i < kBlockLogits; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      best[lane] = logits[i + lane] > best[lane] ? logits[i + lane] : best[lane];
    }
  }
  return *std::max_element(best.begin(), best.end());
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
  for (std::size_t b = 0; b < full; ++b) maxima[b] = block_max(logits.data() + b * kBlockLogits);
  if (full < maxima.size()) maxima[full] = block_max(padded(logits.subspan(full * kBlockLogits)).data());
  float best = kMinusInfinity;
  for (const float value : maxima) best = std::max(best, value);
  return std::min(best, kMaxFinite);
}

void exp_weights(std::span<const float> logits, float max, float scale, std::span<float> weights) {
  NB_ASSERT(weights.size() == logits.size());
  const std::size_t full = logits.size() / kBlockLogits * kBlockLogits;
  for (std::size_t i = 0; i < full; i += kBlockLogits) {
    block_weights(logits.data() + i, max, scale, weights.data() + i);
  }
  if (full == logits.size()) return;
  Block tail;
  block_weights(padded(logits.subspan(full)).data(), max, scale, tail.data());
  std::copy_n(tail.begin(), logits.size() - full, weights.begin() + static_cast<std::ptrdiff_t>(full));
}

double exp_sums(std::span<const float> logits, float max, float scale, std::span<float> sums) {
  NB_ASSERT(sums.size() == num_blocks(logits.size()));
  const std::size_t full = logits.size() / kBlockLogits;
  double total = 0.0;
  for (std::size_t b = 0; b < full; ++b) {
    sums[b] = block_sum(logits.data() + b * kBlockLogits, max, scale);
    total += static_cast<double>(sums[b]);
  }
  if (full < sums.size()) {
    sums[full] = block_sum(padded(logits.subspan(full * kBlockLogits)).data(), max, scale);
    total += static_cast<double>(sums[full]);
  }
  return total;
}

double log_sum_exp(std::span<const float> logits) {
  // In pieces, so that no memory is needed for what belongs to a block.
  constexpr std::size_t kPieceBlocks = 128;
  std::array<float, kPieceBlocks> scratch;
  const auto for_pieces = [&](const auto& function) {
    for (std::size_t begin = 0; begin < logits.size(); begin += kPieceBlocks * kBlockLogits) {
      const auto piece = logits.subspan(begin, std::min(kPieceBlocks * kBlockLogits, logits.size() - begin));
      function(piece, std::span(scratch).first(num_blocks(piece.size())));
    }
  };
  float max = kMinusInfinity;
  for_pieces([&](auto piece, auto blocks) { max = std::max(max, block_maxima(piece, blocks)); });
  if (max == kMinusInfinity) return std::numeric_limits<double>::quiet_NaN();
  double total = 0.0;
  for_pieces([&](auto piece, auto blocks) { total += exp_sums(piece, max, 1.0f, blocks); });
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
