// What the disk store writes, keeps and gives up, and that nobody waits for it.
#include <gtest/gtest.h>

#include <chrono>
#include <mutex>
#include <thread>

#include "base/code_of.h"
#include "base/error.h"
#include "kv/disk_scratch.h"
#include "kv/disk_store.h"

namespace nb::kv {
namespace {

using PutResult = DiskStore::PutResult;

TEST(DiskStoreWriter, PuttingAKeyAgainWritesNothing) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  EXPECT_EQ(put(store, chunk(1)), PutResult::queued);
  store.flush();
  int fills = 0;
  const auto fill = [&](std::size_t, std::span<std::byte>) { ++fills; };
  EXPECT_EQ(store.put(chunk(1), fill), PutResult::present);
  EXPECT_EQ(fills, 0);
  EXPECT_EQ(store.stats().writes, 1);
  EXPECT_TRUE(serves(store, chunk(1)));
  // A file that vanished is written again, and until then a miss.
  std::filesystem::remove(scratch.only_file());
  EXPECT_FALSE(serves(store, chunk(1)));
  EXPECT_EQ(store.stats().missed(MissReason::absent), 1);
  EXPECT_EQ(put(store, chunk(1)), PutResult::queued);
  store.flush();
  std::filesystem::remove(scratch.only_file());
  EXPECT_EQ(put(store, chunk(1)), PutResult::queued);
  store.flush();
  EXPECT_TRUE(serves(store, chunk(1)));
}

TEST(DiskStoreWriter, EvictsWhatWasUsedLeastRecentlyByTheTimesOfTheFiles) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  {
    DiskStore store(scratch.store(), kFingerprint, megabytes(64));
    for (int i = 0; i < 5; ++i) put(store, chunk(i));
    store.flush();
    const int order[] = {3, 0, 4, 1, 2};
    for (int i = 0; i < 5; ++i) {
      set_used_at(scratch.store() + "/" + record_file_name(chunk(order[i]).key, kFingerprint), 1000 + i);
    }
  }
  DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = 5 * bytes + bytes / 2});
  EXPECT_EQ(store.stats().evictions, 0);
  EXPECT_TRUE(serves(store, chunk(0)));  // a use counts
  put(store, chunk(5));
  store.flush();
  EXPECT_FALSE(serves(store, chunk(3)));
  put(store, chunk(6));
  store.flush();
  EXPECT_FALSE(serves(store, chunk(4)));
  for (const int i : {0, 1, 2, 5, 6}) EXPECT_TRUE(serves(store, chunk(i))) << i;
  EXPECT_EQ(store.stats().evictions, 2);
  EXPECT_EQ(store.stats().bytes, 5 * bytes);
  EXPECT_EQ(scratch.bytes(), 5 * bytes);
}

TEST(DiskStoreWriter, ASmallerQuotaIsKeptFromTheBeginning) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  {
    DiskStore store(scratch.store(), kFingerprint, megabytes(64));
    for (int i = 0; i < 5; ++i) put(store, chunk(i));
  }
  for (int i = 0; i < 5; ++i) {
    set_used_at(scratch.store() + "/" + record_file_name(chunk(i).key, kFingerprint), 1000 + i);
  }
  // Foreign records count, and the oldest goes first, whosever it is.
  DiskStore store(scratch.store(), digest_of("another"), {.quota_bytes = 3 * bytes});
  EXPECT_EQ(scratch.bytes(), 3 * bytes);
  EXPECT_EQ(store.stats().evictions, 2);
  put(store, chunk(9));
  store.flush();
  EXPECT_EQ(store.stats().foreign_records, 2);
  EXPECT_TRUE(std::filesystem::exists(scratch.store() + "/" + record_file_name(chunk(4).key, kFingerprint)));
  EXPECT_FALSE(std::filesystem::exists(scratch.store() + "/" + record_file_name(chunk(2).key, kFingerprint)));
}

TEST(DiskStoreWriter, EvictsTheEndOfAChainBeforeItsBeginning) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(link(1, 0)));
  DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = 4 * bytes});
  for (int i = 0; i < 4; ++i) put(store, link(1, i));
  store.flush();
  // Read from the root on, the beginning is what was used first.
  for (int i = 0; i < 4; ++i) {
    set_used_at(scratch.store() + "/" + record_file_name(link(1, i).key, kFingerprint), 1000 + i);
  }
  put(store, link(2, 0));
  store.flush();
  EXPECT_FALSE(serves(store, link(1, 3)));
  put(store, link(3, 0));
  store.flush();
  EXPECT_FALSE(serves(store, link(1, 2)));
  EXPECT_TRUE(serves(store, link(1, 0)));
  EXPECT_TRUE(serves(store, link(1, 1)));
}

TEST(DiskStoreWriter, NeverEvictsWhatIsPinnedNorWhatItFollows) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(link(1, 0)));
  {
    DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = 3 * bytes});
    put(store, link(1, 0));
    put(store, link(1, 1), true);
    for (int i = 2; i < 6; ++i) put(store, link(i, 0));
    store.flush();
    EXPECT_TRUE(serves(store, link(1, 0)));
    EXPECT_TRUE(serves(store, link(1, 1)));
  }
  DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = 3 * bytes});
  for (int i = 6; i < 9; ++i) put(store, link(i, 0));
  store.flush();
  EXPECT_TRUE(serves(store, link(1, 0)));
  EXPECT_TRUE(serves(store, link(1, 1)));
  EXPECT_TRUE(serves(store, link(8, 0)));
  // With everything pinned there is no room, which is counted; taken back, there is.
  EXPECT_TRUE(store.pin(link(8, 0).key, true));
  put(store, link(9, 0));
  store.flush();
  EXPECT_EQ(store.stats().failed(WriteFailure::quota), 1);
  EXPECT_FALSE(serves(store, link(9, 0)));
  EXPECT_TRUE(store.pin(link(1, 1).key, false));
  put(store, link(9, 0));
  store.flush();
  EXPECT_TRUE(serves(store, link(9, 0)));
  EXPECT_TRUE(serves(store, link(8, 0)));
  EXPECT_FALSE(store.pin(link(77, 0).key, true));
  EXPECT_EQ(put(store, link(9, 0), true), PutResult::present);  // pins it
  put(store, link(10, 0));
  put(store, link(11, 0));
  store.flush();
  EXPECT_TRUE(serves(store, link(9, 0)));
  EXPECT_LE(scratch.bytes(), 3 * bytes);
}

TEST(DiskStoreWriter, ANamespaceKeepsItsOwnQuota) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = 100 * bytes, .namespace_quota_bytes = 2 * bytes});
  put(store, chunk(100, 40, "quiet"));
  for (int i = 0; i < 10; ++i) put(store, chunk(i, 40, "flood"));
  store.flush();
  EXPECT_EQ(store.records(digest_of("flood")).size(), 2u);
  EXPECT_TRUE(serves(store, chunk(8, 40, "flood")));
  EXPECT_TRUE(serves(store, chunk(9, 40, "flood")));
  EXPECT_TRUE(serves(store, chunk(100, 40, "quiet")));
}

TEST(DiskStoreWriter, RefusesAtOnceWhatIsLargerThanTheQuota) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = bytes});
  put(store, chunk(1));
  store.flush();
  EXPECT_EQ(put(store, chunk(2, 4000)), PutResult::refused);
  EXPECT_EQ(store.stats().failed(WriteFailure::quota), 1);
  EXPECT_TRUE(serves(store, chunk(1)));
}

TEST(DiskStoreWriter, AUseByAnotherStoreCountsWhenThisOneEvicts) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  DiskStore a(scratch.store(), kFingerprint, {.quota_bytes = 3 * bytes});
  for (int i = 0; i < 3; ++i) put(a, chunk(i));
  a.flush();
  for (int i = 0; i < 3; ++i) {
    set_used_at(scratch.store() + "/" + record_file_name(chunk(i).key, kFingerprint), 1000 + i);
  }
  DiskStore b(scratch.store(), kFingerprint, {.quota_bytes = 3 * bytes});
  std::this_thread::sleep_for(std::chrono::milliseconds(70));
  EXPECT_EQ(a.records(digest_of("")).size(), 3u);  // from now on the directory stays as it is
  EXPECT_TRUE(serves(b, chunk(0)));
  put(a, chunk(3));
  a.flush();
  EXPECT_FALSE(serves(b, chunk(1)));
  EXPECT_TRUE(serves(b, chunk(0)));
}

TEST(DiskStoreWriter, TwoStoresThatWriteKeepOneQuota) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  DiskStore a(scratch.store(), kFingerprint, {.quota_bytes = 8 * bytes});
  DiskStore b(scratch.store(), kFingerprint, {.quota_bytes = 8 * bytes});
  const auto work = [](DiskStore& store, int first) {
    for (int i = first; i < first + 60; ++i) {
      put(store, chunk(i));
      if (i % 7 == 0) store.flush();
      serves(store, chunk(i - 3));
    }
    store.flush();
  };
  std::thread other([&] { work(a, 0); });
  work(b, 1000);
  other.join();
  EXPECT_LE(scratch.bytes(), 8 * bytes);
  EXPECT_EQ(a.stats().missed(MissReason::checksum) + b.stats().missed(MissReason::checksum), 0);
  EXPECT_EQ(a.stats().missed(MissReason::torn) + b.stats().missed(MissReason::torn), 0);
  EXPECT_GT(a.stats().hits + b.stats().hits, 0);
}

TEST(DiskStoreWriter, EraseAlsoTakesBackWhatIsWaiting) {
  const Scratch scratch;
  DiskStoreOptions options = megabytes(16);
  WriteGate gate;
  gate.guard(options);
  DiskStore store(scratch.store(), kFingerprint, options);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(put(store, chunk(i)), PutResult::queued);
  EXPECT_EQ(put(store, chunk(1)), PutResult::present);  // waiting
  gate.wait_until_reached();
  EXPECT_TRUE(store.erase(chunk(0).key));  // is being written
  EXPECT_TRUE(store.erase(chunk(1).key));
  EXPECT_FALSE(store.erase(chunk(1).key));
  gate.open();
  store.flush();
  EXPECT_FALSE(serves(store, chunk(0)));
  EXPECT_FALSE(serves(store, chunk(1)));
  EXPECT_TRUE(serves(store, chunk(2)));
  EXPECT_EQ(scratch.names().size(), 1u);
  EXPECT_TRUE(store.erase(chunk(2).key));
  EXPECT_TRUE(scratch.names().empty());
}

TEST(DiskStoreWriter, APinOfWhatIsWaitingHoldsWhenItIsWritten) {
  const Scratch scratch;
  DiskStoreOptions options = megabytes(16);
  WriteGate gate;
  gate.guard(options);
  DiskStore store(scratch.store(), kFingerprint, options);
  for (int i = 0; i < 4; ++i) put(store, chunk(i));
  gate.wait_until_reached();
  EXPECT_TRUE(store.pin(chunk(0).key, true));  // is being written
  EXPECT_TRUE(store.pin(chunk(1).key, true));
  EXPECT_EQ(put(store, chunk(2), true), PutResult::present);
  gate.open();
  store.flush();
  for (int i = 0; i < 4; ++i) {
    struct stat status {};
    ASSERT_EQ(::stat((scratch.store() + "/" + record_file_name(chunk(i).key, kFingerprint)).c_str(), &status), 0);
    EXPECT_EQ((status.st_mode & S_IWUSR) == 0, i < 3) << i;
  }
}

TEST(DiskStoreWriter, PutNeverWaitsForTheDisk) {
  const Scratch scratch;
  const auto bytes = static_cast<std::int64_t>(record_file_bytes(chunk(1)));
  DiskStoreOptions options = megabytes(16);
  options.queue_bytes = 3 * bytes;
  WriteGate gate;
  gate.guard(options);
  DiskStore store(scratch.store(), kFingerprint, options);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(put(store, chunk(i)), PutResult::queued);
  EXPECT_EQ(put(store, chunk(3)), PutResult::refused);
  EXPECT_EQ(store.stats().failed(WriteFailure::queue), 1);
  EXPECT_FALSE(serves(store, chunk(0)));  // nor does a lookup
  gate.open();
  store.flush();
  EXPECT_EQ(put(store, chunk(4, 10000)), PutResult::queued);  // larger than the queue, which is empty
  store.flush();
  EXPECT_TRUE(serves(store, chunk(4, 10000)));
  EXPECT_TRUE(serves(store, chunk(2)));
}

TEST(DiskStoreWriter, WaitsNoLongerThanAskedAndDropsTheRest) {
  const Scratch scratch;
  std::mutex gate;
  FileCalls calls;
  calls.fsync = [&](int descriptor) {
    const std::lock_guard lock(gate);
    return ::fsync(descriptor);
  };
  DiskStore store(scratch.store(), digest_of("model"), {.quota_bytes = 1 << 30, .calls = calls});
  {
    const std::lock_guard lock(gate);
    for (int i = 0; i < 3; ++i) put(store, chunk(i));
    EXPECT_TRUE(store.knows(chunk(2).key)) << "it waits";
    EXPECT_GT(store.stats().waiting_bytes, 0);
    while (scratch.names().empty()) std::this_thread::yield();  // the first is being written
    EXPECT_FALSE(store.flush_within(std::chrono::milliseconds(20)));
    store.drop_waiting();
  }
  EXPECT_TRUE(store.flush_within(std::chrono::seconds(60)));
  EXPECT_EQ(store.stats().writes, 1);
  EXPECT_EQ(store.stats().waiting_bytes, 0);
  EXPECT_TRUE(store.knows(chunk(0).key));
  EXPECT_FALSE(store.knows(chunk(2).key));
  EXPECT_EQ(scratch.names().size(), 1u);
}

TEST(DiskStoreWriter, WhatIsKnownIsMatchedWithoutLooking) {
  const Scratch scratch;
  DiskStore store(scratch.store(), digest_of("model"), {.quota_bytes = 1 << 30});
  DiskStore other(scratch.store(), digest_of("model"), {.quota_bytes = 1 << 30});
  const RecordInfo info = link(1, 0, 64);
  put(store, info);
  store.flush();
  std::vector<TokenId> wanted(info.tokens.begin(), info.tokens.begin() + 40);
  ASSERT_TRUE(store.match_known(info.parent, wanted));
  EXPECT_EQ(store.match_known(info.parent, wanted)->num_tokens, 32u);
  EXPECT_FALSE(other.match_known(info.parent, wanted));
  EXPECT_TRUE(other.match(info.parent, wanted));
  EXPECT_TRUE(other.match_known(info.parent, wanted));
}

TEST(DiskStoreWriter, AFillerThatThrowsLeavesNothingBehind) {
  const Scratch scratch;
  DiskStoreOptions options = megabytes(1);
  options.queue_bytes = 1;
  DiskStore store(scratch.store(), kFingerprint, options);
  for (int i = 0; i < 3; ++i) {
    const auto fill = [](std::size_t, std::span<std::byte>) { fail(ErrorCode::device, "lost"); };
    EXPECT_EQ(code_of([&] { store.put(chunk(1), fill); }), ErrorCode::device);
  }
  EXPECT_EQ(put(store, chunk(1)), PutResult::queued);  // the queue is empty
  store.flush();
  EXPECT_TRUE(serves(store, chunk(1)));
}

TEST(DiskStoreWriter, RefusesWhatNoRecordCanBe) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  std::vector<RecordInfo> wrong;
  wrong.push_back(link(1, 0, 17));   // not full blocks
  wrong.push_back(link(1, 0, 272));  // more than 16
  wrong.push_back(chunk(1, 0));
  wrong.push_back(chunk(1));
  wrong.back().block_bytes = 0;
  wrong.push_back(chunk(1));
  wrong.back().metadata.assign(kMaxStoreMetadata + 1, 'x');
  wrong.push_back(chunk(1));
  wrong.back().kind = static_cast<RecordKind>(3);
  for (const RecordInfo& info : wrong) {
    EXPECT_EQ(code_of([&] { put(store, info); }), ErrorCode::invalid_argument);
  }
  const std::vector<std::byte> block(kBlockBytes);
  const std::vector<std::span<const std::byte>> blocks(3, block);
  EXPECT_EQ(store.put(chunk(1), blocks), PutResult::queued);
  const auto too_few = std::span(blocks).first(2);
  EXPECT_EQ(code_of([&] { store.put(chunk(2), too_few); }), ErrorCode::invalid_argument);
  const std::vector<std::span<const std::byte>> short_blocks(3, std::span<const std::byte>(block).first(999));
  EXPECT_EQ(code_of([&] { store.put(chunk(2), short_blocks); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { DiskStore none(scratch.store(), kFingerprint, {}); }), ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace nb::kv
