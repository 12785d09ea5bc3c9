#include "engine/step_arrays.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <span>

#include "tensor/device_memory.h"

namespace nb::engine {
namespace {

int copies_in = 0;

/// Host memory that counts copies.
const DeviceMemory& memory() {
  static const DeviceMemory table = [] {
    DeviceMemory memory{};
    memory.name = "host:0";
    memory.allocate = [](std::size_t bytes) { return std::malloc(bytes); };
    memory.release = [](void* data) { std::free(data); };
    memory.copy_in = [](void* to, const void* from, std::size_t bytes) {
      ++copies_in;
      std::memcpy(to, from, bytes);
    };
    memory.take_error = []() -> const char* { return nullptr; };
    return memory;
  }();
  return table;
}

/// Sequences of one row each, and blocks.
model::StepInputs make_inputs(int rows, int num_blocks) {
  model::StepInputs in;
  for (int r = 0; r < rows; ++r) {
    in.token_ids.push_back(100 + r);
    in.positions.push_back(200 + r);
    in.key_positions.push_back(300 + r);
    in.slots.push_back(400 + r);
    in.segments.push_back({.row_begin = r, .row_count = 1, .run_begin = r, .run_count = 1});
    in.runs.push_back({.block_begin = r, .num_keys = 500 + r, .position_offset = 0});
    in.logit_rows.push_back(r);
  }
  std::reverse(in.segments.begin(), in.segments.end());
  for (int b = 0; b < num_blocks; ++b) in.blocks.push_back(600 + b);
  return in;
}

class StepArraysTest : public testing::Test {
 protected:
  template <class T>
  const T* find(const std::vector<T>& values) {
    const T* found = workspace_.on_device(std::span<const T>(values));
    EXPECT_EQ(std::memcmp(found, values.data(), values.size() * sizeof(T)), 0);
    return found;
  }

  StepArrays arrays_{&memory()};
  std::shared_ptr<CachingPool> pool_ = CachingPool::create(&memory());
  Workspace workspace_{pool_};
};

TEST_F(StepArraysTest, EveryArrayIsFoundAfterOneCopy) {
  const model::StepInputs in = make_inputs(70, 90);
  copies_in = 0;
  arrays_.upload(in, 32, workspace_);
  EXPECT_EQ(copies_in, 1);
  for (const auto* array : {&in.token_ids, &in.positions, &in.key_positions, &in.slots, &in.blocks}) find(*array);
  find(in.segments);
  find(in.runs);
  for (std::size_t begin = 0; begin < 70; begin += 32) {
    const auto group = std::span(in.logit_rows).subspan(begin, std::min<std::size_t>(32, 70 - begin));
    EXPECT_EQ(workspace_.on_device(group)[0], static_cast<std::int32_t>(begin));
  }
  const auto make = []() -> std::vector<std::int32_t> { throw std::logic_error("made again"); };
  const std::int32_t* const segments = workspace_.derived_on_device(in.segments.data(), make);
  EXPECT_EQ(segments[0], 69);
  EXPECT_EQ(segments[69], 0);
  EXPECT_EQ(copies_in, 1);
}

TEST_F(StepArraysTest, PlacesDependOnRowsAndRoomForRunsOnly) {
  const auto places = [&](const model::StepInputs& in) {
    workspace_.reset();
    arrays_.upload(in, 32, workspace_);
    return std::vector<const void*>{find(in.token_ids),  find(in.positions), find(in.key_positions), find(in.slots),
                                    find(in.logit_rows), find(in.segments),  find(in.runs),          find(in.blocks)};
  };
  model::StepInputs three = make_inputs(3, 3), more = make_inputs(3, 700);
  more.runs.push_back(more.runs.back());  // of four that there is room for
  EXPECT_EQ(StepArrays::run_room(three), StepArrays::run_room(more));
  EXPECT_EQ(places(three), places(more));
  EXPECT_EQ(places(three), places(three));
}

TEST_F(StepArraysTest, MovesOnlyWhereThereIsTooLittleRoomAndSaysSoBefore) {
  const model::StepInputs small = make_inputs(2, 10), large = make_inputs(2, 100'000);
  EXPECT_TRUE(arrays_.would_move(small));
  arrays_.upload(small, 32, workspace_);
  EXPECT_FALSE(arrays_.would_move(small));
  EXPECT_TRUE(arrays_.would_move(large));
  workspace_.reset();
  arrays_.upload(large, 32, workspace_);
  find(large.blocks);
  EXPECT_FALSE(arrays_.would_move(large));
  EXPECT_FALSE(arrays_.would_move(small));
}

TEST(StepArraysOnHost, NothingIsCopied) {
  const model::StepInputs in = make_inputs(2, 10);
  StepArrays arrays(nullptr);
  EXPECT_FALSE(arrays.would_move(in));
  Workspace workspace(CachingPool::create());
  arrays.upload(in, 32, workspace);
  EXPECT_EQ(arrays.capacity_bytes(), 0U);
  EXPECT_EQ(workspace.on_device(std::span(in.blocks)), in.blocks.data());
}

}  // namespace
}  // namespace nb::engine
