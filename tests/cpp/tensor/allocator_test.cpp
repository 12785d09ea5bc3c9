#include "tensor/allocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>

#include "base/error.h"

namespace nb {
namespace {

TEST(HostArena, GivesZeroedAlignedMemoryOnHugePageRegions) {
  const auto arena = HostArena::create(1);
  const Buffer small = arena->allocate(100);
  const Buffer large = arena->allocate(5 << 20, 4096);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(small.data()) % kHugePageBytes, 0u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large.data()) % 4096, 0u);
  EXPECT_TRUE(std::all_of(large.data(), large.data() + large.bytes(), [](std::byte b) { return b == std::byte{0}; }));
  EXPECT_EQ(arena->stats().in_use_bytes, 100u + (5u << 20));
  EXPECT_EQ(arena->stats().system_allocs, 2u);
}

TEST(HostArena, BuffersOutliveTheHandle) {
  auto arena = HostArena::create(1);
  Buffer buffer = arena->allocate(64);
  arena.reset();
  std::memset(buffer.data(), 1, 64);
  EXPECT_EQ(buffer.data()[63], std::byte{1});
}

TEST(HostArena, RefusesAbsurdSizes) {
  try {
    HostArena::create()->allocate(std::size_t{1} << 50);
    FAIL() << "a petabyte was allocated";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
  }
}

TEST(CachingPool, ReusesReturnedPieces) {
  const auto pool = CachingPool::create();
  std::byte* first = nullptr;
  {
    const Buffer buffer = pool->allocate(1000);
    first = buffer.data();
    EXPECT_EQ(pool->stats().in_use_bytes, CachingPool::size_class(1000));
  }
  EXPECT_EQ(pool->stats().in_use_bytes, 0u);
  EXPECT_EQ(pool->stats().cached_bytes, CachingPool::size_class(1000));
  const Buffer again = pool->allocate(990);
  EXPECT_EQ(again.data(), first);
  EXPECT_EQ(pool->stats().system_allocs, 1u);
  pool->trim();
  EXPECT_EQ(pool->stats().cached_bytes, 0u);
}

TEST(CachingPool, SizeClassesCoverAndWasteAtMostHalf) {
  for (std::size_t bytes = 1; bytes < 100000; bytes += 37) {
    EXPECT_GE(CachingPool::size_class(bytes), bytes);
    if (bytes > 64) {
      EXPECT_LE(CachingPool::size_class(bytes), bytes * 3 / 2 + 1);
    }
  }
}

// Random traffic: pieces never overlap and the counters always add up.
TEST(CachingPool, RandomTrafficKeepsItsBooks) {
  const auto pool = CachingPool::create();
  std::mt19937 random(1);
  std::vector<std::pair<Buffer, std::byte>> live;
  std::size_t in_use = 0;
  for (int i = 0; i < 3000; ++i) {
    if (live.empty() || random() % 2 == 0) {
      const std::size_t bytes = 1 + random() % 50000;
      const auto mark = static_cast<std::byte>(random());
      Buffer buffer = pool->allocate(bytes);
      std::memset(buffer.data(), static_cast<int>(mark), bytes);
      in_use += (CachingPool::size_class(bytes) + 63) / 64 * 64;
      live.emplace_back(buffer, mark);
    } else {
      const std::size_t index = random() % live.size();
      const auto& [buffer, mark] = live[index];
      EXPECT_EQ(buffer.data()[0], mark);
      EXPECT_EQ(buffer.data()[buffer.bytes() - 1], mark);
      in_use -= (CachingPool::size_class(buffer.bytes()) + 63) / 64 * 64;
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(index));
    }
    ASSERT_EQ(pool->stats().in_use_bytes, in_use);
  }
}

TEST(HostArena, TrimKeepsWhatIsUsedAndWhatFollowsIsZero) {
  const auto arena = HostArena::create(1);
  Buffer first = arena->allocate(5000);
  std::fill_n(first.as<std::uint8_t>(), 5000, std::uint8_t{7});
  arena->trim();
  Buffer second = arena->allocate(100'000);
  for (std::size_t i = 0; i < 5000; ++i) ASSERT_EQ(first.as<std::uint8_t>()[i], 7);
  for (std::size_t i = 0; i < 100'000; ++i) ASSERT_EQ(second.as<std::uint8_t>()[i], 0);
}

}  // namespace
}  // namespace nb
