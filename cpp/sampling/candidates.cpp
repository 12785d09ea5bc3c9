#include "sampling/candidates.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"
#include "sampling/softmax.h"

namespace nb::sampling {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kMaxFinite = std::numeric_limits<float>::max();
constexpr TokenId kAnyId = std::numeric_limits<TokenId>::max();

bool more_likely(const Candidates::Candidate& a, const Candidates::Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/// Grows, never shrinks, so that memory is cleared once.
template <class T>
void make_room(std::vector<T>& memory, std::size_t size) {
  if (memory.size() < size) memory.resize(size);
}

}  // namespace

void Candidates::reset(std::span<const float> row) {
  logits_ = row;
  ids_ = {};
  blamed_.clear();
  set_temperature(1.0);
}

std::span<float> Candidates::edit() {
  if (logits_.data() != edited_.data()) {
    make_room(edited_, logits_.size());
    std::copy(logits_.begin(), logits_.end(), edited_.begin());
    logits_ = std::span(edited_).first(logits_.size());
  }
  return std::span(edited_).first(logits_.size());
}

void Candidates::mask(TokenId token) { edit()[static_cast<std::size_t>(token)] = kMinusInfinity; }

void Candidates::blame(const char* field) { blamed_.push_back(field); }

/// The logits of a block; the last one may be short.
std::span<const float> Candidates::block_at(std::size_t block) const {
  const std::size_t begin = block * kBlockLogits;
  return logits_.subspan(begin, std::min(kBlockLogits, logits_.size() - begin));
}

float Candidates::find_maxima() {
  make_room(maxima_, num_blocks(logits_.size()));
  max_ = block_maxima(logits_, std::span(maxima_).first(num_blocks(logits_.size())));
  return max_;
}

void Candidates::settle() {
  if (find_maxima() > kMinusInfinity) return;
  NB_CHECK(!blamed_.empty(), internal, "no token can be drawn: all ", logits_.size(), " logits are -infinity or NaN");
  std::string fields = blamed_.front();
  for (std::size_t i = 1; i < blamed_.size(); ++i) fields += std::string(" and ") + blamed_[i];
  NB_CHECK(false, invalid_argument, fields, blamed_.size() > 1 ? " together leave" : " leaves", " no token to draw");
}

void Candidates::set_temperature(double temperature) {
  NB_ASSERT(temperature > 0.0);
  temperature_ = temperature;
  scale_ = static_cast<float>(std::clamp(1.0 / temperature, 1e-37, 1e38));
}

void Candidates::keep_from(float floor, TokenId last_id) {
  // What is kept may lie in the arrays that are read; it is written at or before the place where it was found.
  make_room(kept_logits_, logits_.size());
  make_room(kept_ids_, logits_.size());
  const float lowest = std::max(floor, -kMaxFinite);
  std::size_t kept = 0;
  for (std::size_t block = 0; block < num_blocks(logits_.size()); ++block) {
    if (maxima_[block] < lowest) continue;
    // All places first: writing what is kept must not disturb what is still to be compared.
    for (std::uint64_t places = reaching(block_at(block), lowest); places != 0; places &= places - 1) {
      const std::size_t place = block * kBlockLogits + static_cast<std::size_t>(std::countr_zero(places));
      const float logit = std::min(logits_[place], kMaxFinite);
      const TokenId id = id_at(place);
      kept_logits_[kept] = logit;
      kept_ids_[kept] = id;
      kept += logit > lowest || id <= last_id ? 1 : 0;
    }
  }
  logits_ = std::span(kept_logits_).first(kept);
  ids_ = std::span(kept_ids_).first(kept);
  block_maxima(logits_, std::span(maxima_).first(num_blocks(kept)));
}

/// The largest logit that at least `count` candidates are known to reach: one for each block whose maximum does.
float Candidates::floor_of_most_likely(std::size_t count) {
  const std::size_t blocks = num_blocks(logits_.size());
  if (count > blocks) return -kMaxFinite;
  make_room(order_, blocks);
  std::copy_n(maxima_.begin(), blocks, order_.begin());
  const auto place = order_.begin() + static_cast<std::ptrdiff_t>(count - 1);
  std::nth_element(order_.begin(), place, order_.begin() + static_cast<std::ptrdiff_t>(blocks), std::greater<>());
  return std::clamp(*place, -kMaxFinite, kMaxFinite);
}

/// Puts into ranked_ the `count` most likely of the candidates from `floor` up, in any order but the least likely of
/// them last. A buffer of twice the count is cut back whenever it is full; what is not above the worst of the best
/// `count` found so far cannot be among them any more (ids ascend, so ties have already lost).
void Candidates::gather(float floor, std::size_t count) {
  const std::size_t room = std::max<std::size_t>(2 * count, 1024);
  const auto cut = [&] {
    std::nth_element(ranked_.begin(), ranked_.begin() + static_cast<std::ptrdiff_t>(count) - 1, ranked_.end(),
                     more_likely);
    ranked_.resize(count);
    return std::nextafter(ranked_.back().logit, std::numeric_limits<float>::infinity());
  };
  ranked_.clear();
  for (std::size_t block = 0; block < num_blocks(logits_.size()); ++block) {
    if (maxima_[block] < floor) continue;
    for (std::uint64_t places = reaching(block_at(block), floor); places != 0; places &= places - 1) {
      const std::size_t i = block * kBlockLogits + static_cast<std::size_t>(std::countr_zero(places));
      if (logits_[i] < floor) continue;  // it may have risen
      ranked_.push_back({id_at(i), std::min(logits_[i], kMaxFinite)});
      if (ranked_.size() == room) floor = cut();
    }
  }
  if (!ranked_.empty()) {
    count = std::min(count, ranked_.size());
    cut();
  }
}

void Candidates::keep_most_likely(std::size_t count) {
  if (count >= logits_.size()) return;
  gather(floor_of_most_likely(count), count);
  keep_from(ranked_.back().logit, ranked_.back().id);
}

std::span<const Candidates::Candidate> Candidates::most_likely(std::size_t count) {
  count = std::min(count, logits_.size());
  ranked_.clear();
  if (count > 0) gather(floor_of_most_likely(count), count);
  std::sort(ranked_.begin(), ranked_.end(), more_likely);
  return ranked_;
}

/// Keeps candidates down to `nats` below the maximum, after the temperature; weights_ and the result are their weights
/// and the sum of these.
double Candidates::keep_within(double nats) {
  const double floor = static_cast<double>(max_) + std::max(nats, -88.0) * temperature_;
  keep_from(static_cast<float>(std::max(floor, -static_cast<double>(kMaxFinite))), kAnyId);
  exp_weights(logits_, max_, scale_, std::span(weights_).first(logits_.size()));
  double mass = 0.0;
  for (std::size_t i = 0; i < logits_.size(); ++i) mass += static_cast<double>(weights_[i]);
  return mass;
}

/// Finds the crossing token without sorting them all: first a floor under which it cannot be, then bins of equal logit
/// width, of which only the one in which the sum crosses is sorted.
void Candidates::keep_share(double share) {
  constexpr std::size_t kBins = 4096;
  const auto row = logits_;
  const bool whole = ids_.empty();
  make_room(weights_, row.size());
  const double total = exp_sums(row, max_, scale_, std::span(weights_).first(num_blocks(row.size())));
  const double wanted = share * total;
  // Candidates below `nats` have a mass of at most size * exp(nats) <= (1 - share) * total: the sum crosses above. Few
  // of them are near that bound, so a higher floor will nearly always do, and its mass says whether it does.
  double nats = std::log((1.0 - share) * total / static_cast<double>(row.size())) - 1e-3;
  const double hoped = nats + std::log(16.0);
  if (whole && hoped < -1.0 && keep_within(hoped) >= wanted) {
    nats = hoped;
  } else {
    if (whole) {
      logits_ = row;
      ids_ = {};
      block_maxima(row, std::span(maxima_).first(num_blocks(row.size())));
    }
    keep_within(nats);
  }
  const float per_logit = static_cast<float>(static_cast<double>(kBins) / std::clamp(-nats, 1e-3, 88.0));
  const auto bin_of = [&](float logit) {
    const float place = (max_ - std::min(logit, kMaxFinite)) * scale_ * per_logit;
    return static_cast<std::size_t>(std::min(place, static_cast<float>(kBins - 1)));
  };
  bins_.assign(kBins, 0.0);
  for (std::size_t i = 0; i < logits_.size(); ++i) bins_[bin_of(logits_[i])] += static_cast<double>(weights_[i]);
  double mass = 0.0;
  std::size_t bin = 0;
  std::size_t last = kBins - 1;  // the last bin with anything in it, in case rounding keeps the sum from crossing
  while (last > 0 && bins_[last] == 0.0) --last;
  while (bin < last && mass + bins_[bin] < wanted) mass += bins_[bin++];

  ranked_.clear();
  for (std::size_t i = 0; i < logits_.size(); ++i) {
    if (bin_of(logits_[i]) == bin) ranked_.push_back({id_at(i), logits_[i]});
  }
  std::sort(ranked_.begin(), ranked_.end(), more_likely);
  make_room(order_, ranked_.size());
  const auto logits = std::span(order_).first(ranked_.size());
  std::transform(ranked_.begin(), ranked_.end(), logits.begin(), [](const Candidate& entry) { return entry.logit; });
  const auto weights = std::span(weights_).first(ranked_.size());
  exp_weights(logits, max_, scale_, weights);
  std::size_t crossing = 0;
  for (; crossing + 1 < ranked_.size(); ++crossing) {  // the last one crosses, however the sums have been rounded
    mass += static_cast<double>(weights[crossing]);
    if (mass >= wanted) break;
  }
  keep_from(ranked_[crossing].logit, ranked_[crossing].id);
}

std::int32_t Candidates::rank_of(TokenId token) const {
  NB_ASSERT(ids_.empty());
  const std::size_t index = static_cast<std::size_t>(token);
  const float own = std::isnan(logits_[index]) ? kMinusInfinity : logits_[index];
  std::int32_t before = 0;
  for (std::size_t block = 0; block < num_blocks(logits_.size()); ++block) {
    if (maxima_[block] < own) continue;
    const auto logits = block_at(block);
    const std::size_t begin = block * kBlockLogits;
    for (const float logit : logits) before += logit > own ? 1 : 0;
    const std::size_t lower_ids = std::clamp(index, begin, begin + logits.size()) - begin;
    for (const float logit : logits.first(lower_ids)) before += logit == own ? 1 : 0;
  }
  return before + 1;
}

TokenId Candidates::best() const {
  std::size_t best = 0;
  for (std::size_t block = 0; block < num_blocks(logits_.size()); ++block) {
    if (std::min(maxima_[block], kMaxFinite) != max_) continue;
    best = block * kBlockLogits;
    while (!(logits_[best] >= max_)) ++best;  // a NaN fails the comparison
    break;
  }
  return id_at(best);
}

TokenId Candidates::draw(double uniform) {
  const std::size_t blocks = num_blocks(logits_.size());
  NB_ASSERT(blocks > 0);
  make_room(weights_, std::max(blocks, kBlockLogits));
  const auto sums = std::span(weights_).first(blocks);
  const double wanted = uniform * exp_sums(logits_, max_, scale_, sums);
  double mass = 0.0;
  std::size_t block = 0;
  std::size_t last = 0;  // the last block with a weight, in case rounding lets `wanted` reach the whole mass
  double before = 0.0;   // the mass of the blocks in front of it
  for (; block < blocks; ++block) {
    if (sums[block] <= 0.0f) continue;
    last = block;
    before = mass;
    mass += static_cast<double>(sums[block]);
    if (mass > wanted) break;
  }
  const std::size_t begin = last * kBlockLogits;
  const std::size_t count = std::min(kBlockLogits, logits_.size() - begin);
  const auto weights = std::span(weights_).first(count);
  exp_weights(logits_.subspan(begin, count), max_, scale_, weights);
  std::size_t token = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (weights[i] <= 0.0f) continue;
    token = i;
    before += static_cast<double>(weights[i]);
    if (before > wanted) break;
  }
  return id_at(begin + token);
}

}  // namespace nb::sampling
