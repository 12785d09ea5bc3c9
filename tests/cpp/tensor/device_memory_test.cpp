#include "tensor/device_memory.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "base/error.h"
#include "tensor/workspace.h"

namespace nb {
namespace {

// Host memory that counts, refuses on demand, and fails on demand.
struct Counts {
  int pieces = 0;
  int copies_in = 0;
  std::size_t limit = 1 << 20;
  std::string error;
};
Counts counts;

const DeviceMemory& memory() {
  static const DeviceMemory table = {
      .name = "fake:0",
      .allocate = [](std::size_t bytes) -> void* {
        if (bytes > counts.limit) return nullptr;
        ++counts.pieces;
        return std::malloc(bytes);
      },
      .release =
          [](void* data) {
            --counts.pieces;
            std::free(data);
          },
      .copy_in =
          [](void* to, const void* from, std::size_t bytes) {
            ++counts.copies_in;
            std::memcpy(to, from, bytes);
          },
      .copy_out = [](void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); },
      .copy_within = [](void* to, const void* from, std::size_t bytes) { std::memmove(to, from, bytes); },
      .fill = [](void* to, unsigned char value, std::size_t bytes) { std::memset(to, value, bytes); },
      .free_bytes = [] { return counts.limit; },
      .take_error = []() -> const char* {
        static std::string taken;
        taken.swap(counts.error);
        counts.error.clear();
        return taken.empty() ? nullptr : taken.c_str();
      },
      .pin = [](void*, std::size_t) { return false; },
      .unpin = [](void*) {},
      .copy_in_beside = [](void*, const void*, std::size_t) { return false; },
      .new_mark = []() -> void* { return nullptr; },
      .delete_mark = [](void*) {},
      .set_mark = [](void*) {},
      .wait_for = [](void*) {},
      .begin_recording = [] { return false; },
      .end_recording = []() -> void* { return nullptr; },
      .replay = [](void*) {},
      .delete_graph = [](void*) {},
  };
  return table;
}

class OnDevice : public testing::Test {
 protected:
  OnDevice() { counts = {}; }
  ~OnDevice() override { EXPECT_EQ(counts.pieces, 0) << "pieces that nobody gave back"; }
};

std::string message_of(const std::function<void()>& call, ErrorCode code) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

TEST_F(OnDevice, CopiesKeepTheirBytes) {
  const int values[] = {1, 2, 3};
  const Buffer copy = copy_to(memory(), values, sizeof(values));
  EXPECT_EQ(std::memcmp(copy.data(), values, sizeof(values)), 0);
  EXPECT_EQ(copy.bytes(), sizeof(values));
  EXPECT_EQ(counts.pieces, 1);
}

TEST_F(OnDevice, TooMuchIsAnErrorWithNumbers) {
  counts.limit = 100;
  const std::string message = message_of([] { allocate_on(memory(), 101); }, ErrorCode::out_of_memory);
  EXPECT_EQ(message, "fake:0: cannot allocate 101 bytes; 100 are free");
}

TEST_F(OnDevice, ErrorsAreToldOnce) {
  check(memory());
  counts.error = "a kernel failed";
  EXPECT_EQ(message_of([] { check(memory()); }, ErrorCode::device), "fake:0: a kernel failed");
  check(memory());
}

TEST_F(OnDevice, AFailedDeviceIsToldBeforeItsMemory) {
  counts.limit = 0;
  counts.error = "lost";
  EXPECT_EQ(message_of([] { allocate_on(memory(), 8); }, ErrorCode::device), "fake:0: lost");
  counts.error = "lost";
  const auto pool = CachingPool::create(&memory());
  EXPECT_EQ(message_of([&] { pool->allocate(8); }, ErrorCode::device), "fake:0: lost");
}

TEST_F(OnDevice, PoolsGiveCachedPiecesBackBeforeTheyRefuse) {
  const auto pool = CachingPool::create(&memory());
  pool->allocate(1000);
  EXPECT_EQ(counts.pieces, 1) << "kept for the next request of its size";
  pool->allocate(1000);
  EXPECT_EQ(counts.pieces, 1);
  counts.limit = 100;
  const std::string message = message_of([&] { pool->allocate(5000); }, ErrorCode::out_of_memory);
  EXPECT_NE(message.find("fake:0: cannot allocate"), std::string::npos) << message;
  EXPECT_EQ(counts.pieces, 0);
}

TEST_F(OnDevice, ArraysOfAStepAreCopiedOnce) {
  Workspace workspace(CachingPool::create(&memory()));
  std::vector<int> ids = {4, 5, 6};
  const std::span<const int> view = ids;
  const int* first = workspace.on_device(view);
  EXPECT_NE(first, ids.data());
  EXPECT_EQ(first[2], 6);
  EXPECT_EQ(workspace.on_device(view), first);
  EXPECT_EQ(counts.copies_in, 1);
  EXPECT_NE(workspace.on_device(view.first(2)), first);
  ids[0] = 9;
  workspace.reset();
  EXPECT_EQ(workspace.on_device(view)[0], 9);
}

TEST_F(OnDevice, WhatIsMadeFromAnArrayIsMadeOnce) {
  Workspace workspace(CachingPool::create(&memory()));
  const std::vector<int> ids = {4, 5};
  int calls = 0;
  const auto make = [&] {
    ++calls;
    return std::vector<int>{7, 8, 9};
  };
  const int placed = 0;
  workspace.place_derived(ids.data(), &placed);
  EXPECT_EQ(workspace.derived_on_device(ids.data(), make), &placed) << "where it was said to be";
  workspace.reset();
  const int* first = workspace.derived_on_device(ids.data(), make);
  EXPECT_EQ(first[2], 9);
  EXPECT_EQ(workspace.derived_on_device(ids.data(), make), first);
  EXPECT_NE(workspace.on_device(std::span<const int>(ids)), first) << "the array itself is another thing";
  EXPECT_EQ(calls, 1);
  workspace.reset();
  workspace.derived_on_device(ids.data(), make);
  EXPECT_EQ(calls, 2);
}

TEST(OnHost, ArraysOfAStepAreTheirOwnCopies) {
  Workspace workspace(CachingPool::create());
  const std::vector<int> ids = {1};
  EXPECT_EQ(workspace.on_device(std::span<const int>(ids)), ids.data());
}

}  // namespace
}  // namespace nb
