// Loads under way: what is told of them, when, and that nothing writes to memory that was given back.
#include "engine/load_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>

#include "kv/disk_scratch.h"

namespace nb::engine {
namespace {

using kv::kBlockBytes;
using kv::numbered;
using Memory = std::vector<std::vector<std::byte>>;

constexpr std::chrono::seconds kLong{60};

/// Lets so many blocks be read and holds back whoever reads more.
class Gate {
 public:
  void open(int num_blocks) {
    const std::lock_guard lock(mutex_);
    num_free_ += num_blocks;
    changed_.notify_all();
  }
  void pass(std::size_t bytes) {
    std::unique_lock lock(mutex_);
    if (bytes != kBlockBytes) return;  // a head
    ++num_waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return num_free_ > 0; });
    --num_free_;
    --num_waiting_;
  }
  void wait_for_readers(int count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kLong, [&] { return num_waiting_ == count; }));
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int num_free_ = 0, num_waiting_ = 0;
};

/// Lets a block be read now and then, as long as it is there.
class Opener {
 public:
  explicit Opener(Gate& gate)
      : thread_([this, &gate] {
          while (!ended_) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            gate.open(1);
          }
        }) {}
  ~Opener() {
    ended_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

class LoadQueueTest : public testing::Test {
 protected:
  LoadQueueTest() {
    kv::DiskStoreOptions options{.quota_bytes = 1 << 30};
    options.calls.pread = [this](int descriptor, void* to, std::size_t bytes, off_t offset) {
      gate_.pass(bytes);
      return ::pread(descriptor, to, bytes, offset);
    };
    store_.emplace(scratch_.store(), kv::digest_of("fingerprint"), options);
    for (int i = 0; i < kNumRecords; ++i) kv::put(*store_, kv::chunk(i));
    store_->flush();
  }

  /// Records of 3 blocks each, into memory that is filled with 7.
  std::vector<LoadPart> parts(std::vector<int> records, Memory* memory) {
    std::vector<LoadPart> parts;
    if (memory != nullptr) memory->assign(3 * records.size(), std::vector<std::byte>(kBlockBytes, std::byte{7}));
    for (std::size_t i = 0; i < records.size(); ++i) {
      const kv::RecordInfo info = kv::chunk(records[i]);
      parts.push_back({.key = info.key, .tokens = info.tokens, .memory = {}});
      for (std::size_t k = 0; memory != nullptr && k < 3; ++k) parts[i].memory.emplace_back((*memory)[3 * i + k]);
      if (memory == nullptr) parts[i].own_bytes = 3 * kBlockBytes;
    }
    return parts;
  }

  static bool is_right(const Memory& memory, std::size_t at, int record) {
    for (std::size_t k = 0; k < 3; ++k) {
      if (memory[at + k] != kv::content(kv::chunk(record).key, k)) return false;
    }
    return true;
  }

  static std::size_t finish(LoadQueue& queue, LoadId load) {
    while (true) {
      const std::uint64_t seen = queue.progress();
      if (const auto num_read = queue.take(load)) return *num_read;
      queue.wait(seen, std::chrono::steady_clock::now() + kLong);
    }
  }

  static constexpr int kNumRecords = 8;
  kv::Scratch scratch_;
  Gate gate_;
  std::optional<kv::DiskStore> store_;
};

TEST_F(LoadQueueTest, EndsWithAllPartsAndWakes) {
  std::atomic<int> num_wakes{0};
  LoadQueue queue(*store_, 2, [&] { ++num_wakes; });
  Memory memory;
  const LoadId load = queue.add(parts({4, 2, 6}, &memory));
  gate_.wait_for_readers(2);
  EXPECT_FALSE(queue.take(load));
  const std::uint64_t seen = queue.progress();
  queue.wait(seen, std::chrono::steady_clock::now() + std::chrono::milliseconds(1));
  EXPECT_EQ(queue.progress(), seen) << "a deadline ends the wait";
  gate_.open(9);
  EXPECT_EQ(finish(queue, load), 3u);
  EXPECT_TRUE(is_right(memory, 0, 4) && is_right(memory, 3, 2) && is_right(memory, 6, 6));
  while (num_wakes == 0) std::this_thread::yield();
  EXPECT_EQ(num_wakes, 1);
}

TEST_F(LoadQueueTest, WhatIsBehindAFailureIsNotRead) {
  store_->erase(kv::chunk(2).key);
  LoadQueue queue(*store_, 1, {});
  Memory memory;
  gate_.open(100);
  EXPECT_EQ(finish(queue, queue.add(parts({1, 2, 3, 4}, &memory))), 1u);
  EXPECT_EQ(store_->stats().hits, 1);
  EXPECT_EQ(store_->stats().missed(kv::MissReason::absent), 1);
  EXPECT_TRUE(is_right(memory, 0, 1));
}

TEST_F(LoadQueueTest, AStoppedLoadEndsWithTheBlockInHand) {
  LoadQueue queue(*store_, 1, {});
  Memory memory, others;
  const LoadId stopped = queue.add(parts({0, 1, 2}, &memory));
  const LoadId other = queue.add(parts({3}, &others));
  gate_.wait_for_readers(1);
  {
    const Opener opener(gate_);
    queue.stop(stopped);
  }
  EXPECT_EQ(memory[8], std::vector<std::byte>(kBlockBytes, std::byte{7})) << "it was not read to its end";
  for (auto& block : memory) std::fill(block.begin(), block.end(), std::byte{9});
  gate_.open(3);
  EXPECT_EQ(finish(queue, other), 1u);
  EXPECT_TRUE(is_right(others, 0, 3));
  for (const auto& block : memory) EXPECT_EQ(block, std::vector<std::byte>(kBlockBytes, std::byte{9}));
  EXPECT_EQ(store_->stats().hits, 1);
  const auto& misses = store_->stats().misses;
  EXPECT_EQ(std::accumulate(misses.begin(), misses.end(), std::int64_t{0}), 0) << "that is no miss";
}

TEST_F(LoadQueueTest, MemoryOfItsOwnIsCollected) {
  LoadQueue queue(*store_, 2, {});
  gate_.open(100);
  const LoadId load = queue.add(parts({5, 6}, nullptr));
  const LoadId given_up = queue.add(parts({1}, nullptr));
  std::vector<int> seen;
  while (seen.size() < 2 || queue.progress() < 3) {
    EXPECT_FALSE(seen.size() < 2 && queue.take(load)) << "not before it was collected";
    for (const ReadPart& part : queue.collect()) {
      if (part.load != load) continue;
      EXPECT_TRUE(kv::is_right(part.record));
      EXPECT_EQ(part.record.info().key, kv::chunk(part.index == 0 ? 5 : 6).key);
      seen.push_back(static_cast<int>(part.index));
    }
  }
  queue.collect();
  EXPECT_EQ(finish(queue, load), 2u);
  queue.stop(given_up);
  EXPECT_TRUE(queue.collect().empty());
}

TEST_F(LoadQueueTest, TooMuchMemoryOfItsOwnWaits) {
  LoadQueue queue(*store_, 2, {});
  gate_.open(100);
  std::vector<LoadPart> large = parts({1, 2, 3}, nullptr);
  for (LoadPart& part : large) part.own_bytes = LoadQueue::kMostOwnBytes / 2 + 1;  // one fits, two do not
  const LoadId load = queue.add(std::move(large));
  for (std::size_t i = 0; i < 3; ++i) {
    queue.wait(i, std::chrono::steady_clock::now() + kLong);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_EQ(queue.progress(), i + 1) << "the next one before this was collected";
    EXPECT_EQ(queue.collect().size(), 1u);
  }
  EXPECT_EQ(finish(queue, load), 3u);
}

TEST_F(LoadQueueTest, EndsWithLoadsUnderWay) {
  Memory memory, others;
  {
    const Opener opener(gate_);  // ends behind the queue
    LoadQueue queue(*store_, 1, {});
    queue.add(parts({0, 1}, &memory));
    queue.add(parts({2}, &others));
  }
  EXPECT_EQ(others[2], std::vector<std::byte>(kBlockBytes, std::byte{7}));
}

}  // namespace
}  // namespace nb::engine
