#include "sampling/candidates.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "base/error.h"
#include "sampling/naive_sampler.h"

namespace nb::sampling {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<TokenId> ids_of(const Candidates& candidates) {
  std::vector<TokenId> ids;
  for (std::size_t i = 0; i < candidates.size(); ++i) ids.push_back(candidates.id_at(i));
  return ids;
}

void begin(Candidates& candidates, const std::vector<float>& row) {
  candidates.reset(row);
  candidates.settle();
}

/// Rows that are hard to select from: with ties, ascending, descending, all equal, with broken values.
std::vector<std::vector<float>> hard_rows(std::size_t size) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<std::vector<float>> rows(6, std::vector<float>(size));
  for (float& logit : rows[0]) logit = normal(random);
  for (float& logit : rows[1]) logit = std::round(normal(random));
  rows[2] = rows[0];
  std::sort(rows[2].begin(), rows[2].end());
  rows[3] = rows[2];
  std::reverse(rows[3].begin(), rows[3].end());
  std::fill(rows[4].begin(), rows[4].end(), -7.5f);
  rows[5] = rows[0];
  for (std::size_t i = 0; i < size; i += 3) rows[5][i] = std::array{kNan, -kInfinity, kInfinity}[random() % 3];
  rows[5][size / 2] = 1.0f;
  return rows;
}

/// The first `count` tokens that can be drawn, in the order of the definition.
std::vector<TokenId> naive_front(const std::vector<float>& row, std::size_t count) {
  std::vector<double> values;
  for (const float logit : row) values.push_back(naive::value_of(logit));
  std::vector<TokenId> front;
  for (const std::size_t i : naive::order_of(values)) {
    if (front.size() < count && values[i] > -1e300) front.push_back(static_cast<TokenId>(i));
  }
  return front;
}

TEST(Candidates, MostLikelyIsTheFrontOfTheOrder) {
  for (const std::size_t size : {1u, 5u, 64u, 65u, 1000u, 20000u}) {
    for (const auto& row : hard_rows(size)) {
      for (const std::size_t count : {1u, 2u, 20u, 50u, 313u, 5000u}) {
        Candidates candidates;
        begin(candidates, row);
        const auto expected = naive_front(row, count);
        std::vector<TokenId> ranked;
        for (const auto& entry : candidates.most_likely(count)) ranked.push_back(entry.id);
        ASSERT_EQ(ranked, expected) << size << " " << count;
        if (count >= size) continue;
        candidates.keep_most_likely(count);
        auto sorted = expected;
        std::sort(sorted.begin(), sorted.end());
        ASSERT_EQ(ids_of(candidates), sorted) << size << " " << count;
      }
    }
  }
}

TEST(Candidates, ShareIsTheShortestFrontThatReachesIt) {
  for (const std::size_t size : {1u, 5u, 65u, 1000u, 20000u}) {
    for (const auto& row : hard_rows(size)) {
      for (const double temperature : {0.3, 1.0, 4.0}) {
        for (const double share : {1e-9, 0.1, 0.5, 0.9, 0.999, 1.0 - 1e-7}) {
          Candidates candidates;
          begin(candidates, row);
          candidates.set_temperature(temperature);
          candidates.keep_share(share);
          const auto front = naive_front(row, candidates.size());
          auto kept = front;
          std::sort(kept.begin(), kept.end());
          ASSERT_EQ(ids_of(candidates), kept) << "not the front of the order";
          double total = 0.0, mass = 0.0, before = 0.0;
          const double max = static_cast<double>(candidates.max_logit());
          const auto weight = [&](TokenId id) {
            return std::exp((naive::value_of(row[static_cast<std::size_t>(id)]) - max) / temperature);
          };
          for (std::size_t i = 0; i < size; ++i) total += weight(static_cast<TokenId>(i));
          for (const TokenId id : front) {
            before = mass;
            mass += weight(id);
          }
          ASSERT_GE(mass / total, share - 2e-6) << size << " " << share << " " << temperature;
          ASSERT_LE(before / total, share + 2e-6) << size << " " << share << " " << temperature;
        }
      }
    }
  }
}

TEST(Candidates, FiltersFollowEachOther) {
  const auto row = hard_rows(20000)[1];
  Candidates candidates;
  begin(candidates, row);
  candidates.keep_from(3.0f, std::numeric_limits<TokenId>::max());
  const std::size_t count =
      static_cast<std::size_t>(std::count_if(row.begin(), row.end(), [](float x) { return x >= 3; }));
  ASSERT_EQ(candidates.size(), count);
  candidates.keep_most_likely(500);
  candidates.keep_most_likely(100);
  auto front = naive_front(row, 100);
  std::sort(front.begin(), front.end());
  EXPECT_EQ(ids_of(candidates), front);
}

TEST(Candidates, ARowIsCopiedOnlyToBeChanged) {
  const std::vector<float> row{1.0f, 2.0f, 3.0f};
  Candidates candidates;
  candidates.reset(row);
  EXPECT_EQ(candidates.logits().data(), row.data());
  candidates.mask(2);
  candidates.edit()[0] = 9.0f;
  EXPECT_EQ(row, (std::vector<float>{1.0f, 2.0f, 3.0f}));
  candidates.settle();
  EXPECT_EQ(candidates.best(), 0);
  candidates.reset(row);
  candidates.settle();
  EXPECT_EQ(candidates.best(), 2);
}

TEST(Candidates, NothingLeftIsAnError) {
  Candidates candidates;
  const std::vector<float> row{kNan, -kInfinity};
  candidates.reset(row);
  try {
    candidates.settle();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::internal);
  }
}

TEST(Candidates, DrawInvertsTheCumulativeDistributionInOrderOfId) {
  Candidates candidates;
  const std::vector<float> row{std::log(1.0f), -kInfinity, std::log(2.0f), kNan, std::log(1.0f)};
  begin(candidates, row);
  EXPECT_EQ(candidates.draw(0.0), 0);
  EXPECT_EQ(candidates.draw(0.2499), 0);
  EXPECT_EQ(candidates.draw(0.2501), 2);
  EXPECT_EQ(candidates.draw(0.7499), 2);
  EXPECT_EQ(candidates.draw(0.7501), 4);
  EXPECT_EQ(candidates.draw(std::nextafter(1.0, 0.0)), 4);
}

TEST(Candidates, DrawFindsItsPlaceAcrossBlocks) {
  const std::vector<float> row(1000, -3.0f);
  Candidates candidates;
  begin(candidates, row);
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(candidates.draw((i + 0.5) / 1000.0), i);
}

TEST(Candidates, DrawNeverTakesATokenWithoutWeight) {
  Candidates candidates;
  std::vector<float> row(200, -5000.0f);
  row[70] = 0.0f;
  begin(candidates, row);
  EXPECT_EQ(candidates.draw(0.0), 70);
  EXPECT_EQ(candidates.draw(std::nextafter(1.0, 0.0)), 70);
}

TEST(Candidates, BestOfEqualsIsTheLowerId) {
  Candidates candidates;
  const std::vector<float> tied{-1.0f, 3.0f, kNan, 3.0f};
  begin(candidates, tied);
  EXPECT_EQ(candidates.best(), 1);
  std::vector<float> row(300, kNan);
  row[130] = row[290] = kInfinity;
  begin(candidates, row);
  EXPECT_EQ(candidates.best(), 130);
}

}  // namespace
}  // namespace nb::sampling
