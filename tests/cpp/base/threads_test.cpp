#include "base/threads.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/error.h"

namespace nb {
namespace {

class Threads : public testing::TestWithParam<int> {};

TEST_P(Threads, EveryMemberRunsOncePerPhase) {
  ThreadPool pool(GetParam());
  std::vector<int> counts(static_cast<std::size_t>(GetParam()), 0);
  for (int phase = 0; phase < 2000; ++phase) {
    pool.run([&](const Part& part) {
      EXPECT_EQ(part.count, GetParam());
      ++counts[static_cast<std::size_t>(part.index)];
    });
  }
  for (int count : counts) EXPECT_EQ(count, 2000);
}

// What one member wrote before a barrier, every member sees after it.
TEST_P(Threads, BarrierPublishesWrites) {
  ThreadPool pool(GetParam());
  const auto size = static_cast<std::size_t>(GetParam());
  std::vector<int> written(size);
  std::vector<int> failures(size, 0);
  for (int phase = 0; phase < 300; ++phase) {
    pool.run([&](const Part& part) {
      for (int round = 0; round < 5; ++round) {
        written[static_cast<std::size_t>(part.index)] = phase * 10 + round;
        part.barrier();
        for (int value : written) failures[static_cast<std::size_t>(part.index)] += value != phase * 10 + round;
        part.barrier();
      }
    });
  }
  for (int count : failures) EXPECT_EQ(count, 0);
}

TEST_P(Threads, WakesAfterSleeping) {
  ThreadPool pool(GetParam());
  std::atomic<int> ran{0};
  for (int phase = 0; phase < 3; ++phase) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // longer than the spin
    pool.run([&](const Part&) { ran.fetch_add(1); });
  }
  EXPECT_EQ(ran.load(), 3 * GetParam());
}

INSTANTIATE_TEST_SUITE_P(Sizes, Threads, testing::Values(1, 2, 3, 5));

TEST(ThreadPool, RefusesBadSizes) {
  EXPECT_THROW(ThreadPool(0), Error);
  EXPECT_THROW(ThreadPool(257), Error);
  EXPECT_GE(ThreadPool::default_num_threads(), 1);
}

#if defined(__x86_64__)
// A host program that flushes denormals must not change results; its mode must survive a phase.
TEST(ThreadPool, RunsUnderTheDefaultFloatEnvironment) {
  ThreadPool pool(2);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
  std::vector<unsigned> seen(2);
  pool.run([&](const Part& part) { seen[static_cast<std::size_t>(part.index)] = _mm_getcsr() & 0xffc0; });
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(after & 0x8040, 0x8040u);
  EXPECT_EQ(seen, (std::vector<unsigned>{0x1f80, 0x1f80}));
}
#endif

}  // namespace
}  // namespace nb
