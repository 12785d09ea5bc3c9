#include "engine/composition.h"

#include <gtest/gtest.h>

#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

using Ints = std::vector<std::int32_t>;

/// A prompt of 30 tokens with chunks at [4, 12) and [15, 25), the second behind an anchor of 3.
Request composed(ReuseMode mode) {
  Request request = make_request(30, 5);
  request.chunks = {{.begin = 4, .count = 8}, {.begin = 15, .count = 10, .anchor = {1, 2, 3}}};
  request.reuse.mode = mode;
  return request;
}

Ints positions_of(const Composition& composition) {
  return {composition.positions().begin(), composition.positions().end()};
}

bool hides(const PlacedChunk& chunk, int position) {
  const int key = chunk.anchor_len + position - chunk.begin;
  if (chunk.hidden.empty()) return false;
  return (chunk.hidden[static_cast<std::size_t>(key / kBlockTokens)] >> key % kBlockTokens & 1) != 0;
}

TEST(Composition, OfIsolatedChunksOwnsThePlainTokensAndHidesSinks) {
  const auto made = Composition::create(composed(ReuseMode::isolated));
  ASSERT_NE(made, nullptr);
  EXPECT_EQ(positions_of(*made), (Ints{0, 1, 2, 3, 12, 13, 14, 25, 26, 27, 28, 29}));
  EXPECT_EQ(made->lead_len(), 4);
  EXPECT_EQ(made->tail_begin(), 25);
  EXPECT_EQ(made->num_own(), 12);
  EXPECT_EQ(made->num_chunk_tokens(), 18);
  EXPECT_FALSE(made->selecting());
  for (const PlacedChunk& chunk : made->chunks()) {
    for (int position = chunk.begin; position < chunk.end(); ++position) {
      EXPECT_EQ(hides(chunk, position), position == chunk.begin) << position;
    }
  }
}

TEST(Composition, SinksStayVisibleWhereAskedAndAtTheBeginning) {
  Request request = composed(ReuseMode::isolated);
  request.reuse.mask_sink = false;
  const auto made = Composition::create(request);
  for (const PlacedChunk& chunk : made->chunks()) EXPECT_TRUE(chunk.hidden.empty());
  request.reuse.mask_sink = true;
  request.chunks = {{.begin = 0, .count = 8, .anchor = {9}}};
  EXPECT_TRUE(Composition::create(request)->chunks()[0].hidden.empty());
}

TEST(Composition, IsNoneWhereNothingIsApproximate) {
  EXPECT_EQ(Composition::create(composed(ReuseMode::exact)), nullptr);
  Request request = composed(ReuseMode::blend);
  request.reuse.ratio = 1.0;
  EXPECT_EQ(Composition::create(request), nullptr);
  request = composed(ReuseMode::isolated);
  request.chunks = {{.begin = 0, .count = 20}};  // computed alone, it is what computing the prompt gives
  EXPECT_EQ(Composition::create(request), nullptr);
  request.chunks = {};
  EXPECT_EQ(Composition::create(request), nullptr);
  request.chunks = {{.begin = 29, .count = 1}};  // the last token must be computed
  EXPECT_EQ(Composition::create(request), nullptr);
}

TEST(Composition, AChunkOfOneHiddenTokenIsComputedWithTheRest) {
  Request request = composed(ReuseMode::isolated);
  request.chunks[0].count = 1;
  auto made = Composition::create(request);
  ASSERT_NE(made, nullptr);
  ASSERT_EQ(made->chunks().size(), 1u);
  EXPECT_EQ(made->chunks()[0].span, 1);
  EXPECT_EQ(made->lead_len(), 15);
  EXPECT_EQ(made->num_chunk_tokens(), 10);
  request.reuse.mask_sink = false;  // seen, it stays a chunk
  EXPECT_EQ(Composition::create(request)->chunks().size(), 2u);
  request.reuse.mask_sink = true;
  request.chunks[1].count = 1;  // an anchor changes nothing
  EXPECT_EQ(Composition::create(request), nullptr);
  // Nor does what is left of a chunk before the prompt's last token, and at the beginning nothing is hidden.
  request.chunks = {{.begin = 28, .count = 2}};
  EXPECT_EQ(Composition::create(request), nullptr);
  request.chunks = {{.begin = 0, .count = 1, .anchor = {1, 2}}};
  made = Composition::create(request);
  ASSERT_NE(made, nullptr);
  EXPECT_FALSE(hides(made->chunks()[0], 0));
}

TEST(Composition, TheLastTokenIsComputedThoughAChunkEndsWithIt) {
  Request request = make_request(20, 1);
  request.chunks = {{.begin = 10, .count = 10}};
  request.reuse.mode = ReuseMode::isolated;
  const auto made = Composition::create(request);
  EXPECT_EQ(made->chunks()[0].count, 9);
  EXPECT_EQ(made->positions().back(), 19);
}

TEST(Composition, BlendTakesTheFirstTokensOfEveryChunk) {
  Request request = composed(ReuseMode::blend);
  request.reuse.selection = BlendSelection::first;
  request.reuse.ratio = 0.3;
  const auto made = Composition::create(request);
  EXPECT_FALSE(made->selecting());
  EXPECT_EQ(made->num_recomputed(), 3 + 3);
  EXPECT_EQ(positions_of(*made), (Ints{0, 1, 2, 3, 4, 5, 6, 12, 13, 14, 15, 16, 17, 25, 26, 27, 28, 29}));
  EXPECT_TRUE(hides(made->chunks()[0], 6));
  EXPECT_FALSE(hides(made->chunks()[0], 7));
}

TEST(Composition, BlendTakesTheLargestDeviationsAndTheEarlierOfEqualOnes) {
  Request request = composed(ReuseMode::blend);
  request.reuse.ratio = 0.2;  // of 18 tokens: 4
  const auto made = Composition::create(request);
  EXPECT_TRUE(made->selecting());
  EXPECT_EQ(made->num_recomputed(), 4);
  EXPECT_EQ(made->num_own(), 16);  // known before it is known which
  EXPECT_EQ(made->positions().size(), 12u);
  EXPECT_EQ(made->chunk_position(0), 4);
  EXPECT_EQ(made->chunk_position(7), 11);
  EXPECT_EQ(made->chunk_position(8), 15);
  for (float& deviation : made->deviations()) deviation = 1.0f;
  made->deviations()[17] = 5.0f;
  made->deviations()[8] = 4.0f;
  made->measured(10);
  EXPECT_TRUE(made->selecting());
  EXPECT_EQ(made->num_measured(), 10);
  made->restart();
  EXPECT_EQ(made->num_measured(), 0);
  made->measured(18);
  EXPECT_FALSE(made->selecting());
  EXPECT_EQ(positions_of(*made), (Ints{0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29}));
  EXPECT_TRUE(hides(made->chunks()[1], 24));
  EXPECT_FALSE(hides(made->chunks()[1], 23));
  made->restart();  // what is known stays known
  EXPECT_FALSE(made->selecting());
}

TEST(Composition, SharesAreRoundedUp) {
  Request request = composed(ReuseMode::blend);
  request.reuse.ratio = 0.001;
  EXPECT_EQ(Composition::create(request)->num_recomputed(), 1);
  request.reuse.ratio = 0.5;
  EXPECT_EQ(Composition::create(request)->num_recomputed(), 9);
}

}  // namespace
}  // namespace nb::engine
