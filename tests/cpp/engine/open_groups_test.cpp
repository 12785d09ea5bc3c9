#include "engine/open_groups.h"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <random>
#include <set>

#include "base/error.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

// A model of the memory: which token each place of a cell has. Whatever the slices, the cell of a row has the row's
// group up to it when it is sealed and when it is read.
TEST(OpenGroups, ACellHasTheTokensOfItsGroupWhateverTheSlices) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const int longest = 1 + static_cast<int>(random() % 50), prompt = 1 + static_cast<int>(random() % 120);
    Sequence sequence(RequestId{1}, random_request(1, prompt, 1), {}, 512);
    kv::BlockPool pool(10);
    ASSERT_TRUE(sequence.table.reserve(pool, prompt));
    OpenPairs pairs(3);
    OpenPair other;
    pairs.take(other);
    pairs.take(sequence.open);
    std::map<int, std::array<int, 16>> lasting;
    std::set<int> sealed;
    // An adopted prefix ends with a block.
    int first = std::min(static_cast<int>(random() % 3) * 16, (prompt - 1) / 16 * 16);
    const int begin = first / 16;
    while (first < prompt) {
      const int count = std::min(prompt - first, 1 + static_cast<int>(random() % static_cast<unsigned>(longest)));
      sequence.table.grow_to(first + count);
      const bool ends = first + count == prompt && seed % 2 == 0;
      model::StepInputs inputs;
      add_open_rows(sequence, first, count, ends, inputs);
      ASSERT_EQ(inputs.open_cells.size(), static_cast<std::size_t>(count));
      std::map<int, std::array<int, 16>> cells = lasting;
      for (int own = first; own < first + count; ++own) {
        const int cell = inputs.open_cells[static_cast<std::size_t>(own - first)];
        EXPECT_TRUE(cell < 0 || cell / 2 != other.index) << cell;
        EXPECT_GE(cell, -inputs.num_step_cells);
        EXPECT_EQ(inputs.open_groups[static_cast<std::size_t>(own - first)], own / 16);
        cells[cell][static_cast<std::size_t>(own % 16)] = own;
      }
      // All rows have been written before one of them is read.
      for (int own = first; own < first + count; ++own) {
        const auto& cell = cells[inputs.open_cells[static_cast<std::size_t>(own - first)]];
        for (int i = own / 16 * 16; i <= own; ++i)
          ASSERT_EQ(cell[static_cast<std::size_t>(i % 16)], i) << "seed " << seed;
      }
      for (const ops::SealItem& item : inputs.seals) {
        const int group = cells[item.cell][0] / 16;
        EXPECT_TRUE(sealed.insert(group).second);
        EXPECT_EQ(item.block, sequence.table.blocks()[static_cast<std::size_t>(group)]);
        EXPECT_EQ(item.num_tokens, std::min(16, prompt - group * 16));
        for (int i = 0; i < item.num_tokens; ++i) {
          EXPECT_EQ(cells[item.cell][static_cast<std::size_t>(i)], group * 16 + i);
        }
      }
      lasting.clear();
      for (const auto& [id, tokens] : cells) {
        if (id >= 0) lasting[id] = tokens;
      }
      sequence.open.advance(first, count);
      first += count;
    }
    const int end = prompt % 16 == 0 || seed % 2 == 0 ? (prompt + 15) / 16 : prompt / 16;
    EXPECT_EQ(static_cast<int>(sealed.size()), end - begin) << "seed " << seed;
    pairs.give_back(sequence.open);
    EXPECT_FALSE(sequence.open.is_there());
    pairs.give_back(sequence.open);
    EXPECT_EQ(pairs.num_free(), 2);
  }
}

TEST(OpenGroups, APairIsTakenByOneAtATime) {
  OpenPairs pairs(2);
  OpenPair a, b, c;
  pairs.take(a);
  pairs.take(b);
  EXPECT_NE(a.index, b.index);
  EXPECT_THROW(pairs.take(c), Error);
  EXPECT_THROW(pairs.take(a), Error);
  pairs.give_back(a);
  pairs.take(c);
  EXPECT_EQ(pairs.num_free(), 0);
}

}  // namespace
}  // namespace nb::engine
