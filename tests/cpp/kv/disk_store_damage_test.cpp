// What happens to the disk store when files, the disk or the process fail: misses and counters, never wrong bytes.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <random>
#include <set>
#include <thread>

#include "base/code_of.h"
#include "base/error.h"
#include "base/log.h"
#include "kv/disk_scratch.h"
#include "kv/disk_store.h"

namespace nb::kv {
namespace {

using PutResult = DiskStore::PutResult;

/// Failures are expected here and warned of.
class DiskStoreDamage : public testing::Test {
 protected:
  DiskStoreDamage() { set_log_level(LogLevel::error); }
  ~DiskStoreDamage() override { set_log_level(before_); }

 private:
  LogLevel before_ = log_level();
};

bool has_temporary(const Scratch& scratch) {
  const std::vector<std::string> names = scratch.names();
  return std::any_of(names.begin(), names.end(), [](const std::string& name) { return !is_record_file_name(name); });
}

/// The one record of `info`, its bytes replaced by `damaged`, opened by a store that knew it whole: the reason of the
/// miss. Checks that a store that finds it so when it opens serves it neither.
MissReason reason_for(const RecordInfo& info, const std::string& whole, const std::string& damaged) {
  const Scratch scratch;
  std::filesystem::create_directory(scratch.store());
  const std::string path = scratch.store() + "/" + record_file_name(info.key, kFingerprint);
  write_file(path, whole);
  MissReason reason = MissReason::count;
  {
    DiskStore store(scratch.store(), kFingerprint, megabytes(8));
    EXPECT_NE(store.find(info.key), nullptr);
    write_file(path, damaged);
    EXPECT_FALSE(serves(store, info));
    EXPECT_EQ(all_misses(store), 1);
    for (int i = 0; i < static_cast<int>(MissReason::count); ++i) {
      if (store.stats().missed(static_cast<MissReason>(i)) == 1) reason = static_cast<MissReason>(i);
    }
    const bool removed = reason == MissReason::torn || reason == MissReason::checksum;
    EXPECT_EQ(std::filesystem::exists(path), !removed) << to_string(reason);
    EXPECT_EQ(store.stats().damaged_removed, removed ? 1 : 0);
    // It can be written again, over whatever is there.
    EXPECT_EQ(put(store, info), removed || store.find(info.key) == nullptr ? PutResult::queued : PutResult::present);
  }
  write_file(path, damaged);
  DiskStore store(scratch.store(), kFingerprint, megabytes(8));
  EXPECT_FALSE(serves(store, info));
  return reason;
}

std::string bytes_of_record(const RecordInfo& info) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(8));
  put(store, info);
  store.flush();
  return read_file(scratch.only_file());
}

std::string flipped(std::string bytes, std::size_t at, int bit) {
  bytes[at] = static_cast<char>(bytes[at] ^ (1 << bit));
  return bytes;
}

TEST_F(DiskStoreDamage, AFlipInAnyByteOfTheHeadIsAMiss) {
  const RecordInfo info = chunk(1, 40);
  const std::string whole = bytes_of_record(info);
  ASSERT_EQ(record_head_bytes(info), kStoreAlignment);
  const Scratch scratch;
  const std::string path = scratch.store() + "/" + record_file_name(info.key, kFingerprint);
  DiskStore store(scratch.store(), kFingerprint, megabytes(8));
  std::mt19937 random(1);
  for (std::size_t at = 0; at < kStoreAlignment; ++at) {
    write_file(path, flipped(whole, at, static_cast<int>(random() % 8)));
    const DiskStoreStats before = store.stats();
    ASSERT_FALSE(store.open(info.key, info.tokens)) << at;
    const bool is_version = at >= 8 && at < 16;  // version and byte order
    const MissReason expected = is_version ? MissReason::version : MissReason::checksum;
    ASSERT_EQ(store.stats().missed(expected), before.missed(expected) + 1) << at;
    ASSERT_EQ(std::filesystem::exists(path), is_version) << at;
  }
  EXPECT_EQ(all_misses(store), static_cast<std::int64_t>(kStoreAlignment));
  write_file(path, whole);
  EXPECT_TRUE(serves(store, info));
}

TEST_F(DiskStoreDamage, EverySectionFlippedWhileOpenAndBefore) {
  for (const RecordInfo& info : {chunk(1, 3000), link(1, 0)}) {
    const std::string whole = bytes_of_record(info);
    const std::size_t tokens = kStoreFixedBytes, metadata = tokens + 4 * info.tokens.size();
    const std::size_t checksums = metadata + info.metadata.size(), end = checksums + 4 * info.num_blocks();
    const std::size_t head = record_head_bytes(info);
    for (const std::size_t at : {std::size_t{0}, std::size_t{17}, std::size_t{100}, tokens, metadata - 1, checksums - 1,
                                 checksums, end - 1, head - 1, head, whole.size() - 1}) {
      EXPECT_EQ(reason_for(info, whole, flipped(whole, at, 3)), MissReason::checksum) << at;
    }
    EXPECT_EQ(reason_for(info, whole, flipped(whole, 8, 1)), MissReason::version);
    EXPECT_EQ(reason_for(info, whole, flipped(whole, 12, 1)), MissReason::version);
  }
}

TEST_F(DiskStoreDamage, FlipsOfRandomBitsInTheBlocksAreMisses) {
  const RecordInfo info = chunk(1, 40);
  const std::string whole = bytes_of_record(info);
  const Scratch scratch;
  const std::string path = scratch.store() + "/" + record_file_name(info.key, kFingerprint);
  DiskStore store(scratch.store(), kFingerprint, megabytes(8));
  std::mt19937 random(2);
  const std::size_t head = record_head_bytes(info);
  for (int round = 0; round < 1500; ++round) {
    const std::size_t at = head + random() % (whole.size() - head);
    write_file(path, flipped(whole, at, static_cast<int>(random() % 8)));
    ASSERT_FALSE(store.open(info.key, info.tokens)) << at;
  }
  EXPECT_EQ(store.stats().missed(MissReason::checksum), 1500);
  EXPECT_EQ(store.stats().damaged_removed, 1500);
}

TEST_F(DiskStoreDamage, AFileCutOrLengthenedAnywhereIsTorn) {
  const RecordInfo info = chunk(1, 1000);  // its head is longer than what is read first
  const std::string whole = bytes_of_record(info);
  const std::size_t tokens = kStoreFixedBytes, metadata = tokens + 4 * info.tokens.size();
  const std::size_t head = record_head_bytes(info);
  ASSERT_GT(head, kStoreAlignment);
  std::set<std::size_t> lengths = {0, 1, 7, 8, 40, 168, tokens, tokens + 1, metadata, metadata + 5, head - 4, head};
  lengths.insert({kStoreAlignment, head - 1, head + 1, head + kBlockBytes, whole.size() - kBlockBytes});
  lengths.insert(whole.size() - 1);
  for (const std::size_t length : lengths) {
    EXPECT_EQ(reason_for(info, whole, whole.substr(0, length)), MissReason::torn) << length;
  }
  EXPECT_EQ(reason_for(info, whole, whole + '\0'), MissReason::torn);
  EXPECT_EQ(reason_for(info, whole, whole + whole), MissReason::torn);
}

TEST_F(DiskStoreDamage, AFileOfZerosOrNoiseIsRemoved) {
  const RecordInfo info = chunk(1, 1000);
  const std::string whole = bytes_of_record(info);
  EXPECT_EQ(reason_for(info, whole, std::string(whole.size(), '\0')), MissReason::checksum);
  std::string noise(whole.size(), '\0');
  std::mt19937 random(3);
  for (char& c : noise) c = static_cast<char>(random());
  EXPECT_EQ(reason_for(info, whole, noise), MissReason::checksum);
}

TEST_F(DiskStoreDamage, LinksPipesAndFoldersUnderItsNamesAreMissesAndNotFollowed) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(8));
  put(store, chunk(1));
  store.flush();
  const std::string target = scratch.only_file(), outside = scratch.folder() + "/outside";
  std::filesystem::rename(target, outside);
  const auto path = [&](int number) {
    return scratch.store() + "/" + record_file_name(chunk(number).key, kFingerprint);
  };
  ASSERT_EQ(::symlink(outside.c_str(), path(1).c_str()), 0);
  ASSERT_EQ(::mkfifo(path(2).c_str(), 0600), 0);
  ASSERT_EQ(::mkdir(path(3).c_str(), 0700), 0);
  write_file(scratch.store() + "/notes.txt", "somebody's");
  for (int i = 1; i <= 3; ++i) EXPECT_FALSE(serves(store, chunk(i))) << i;
  EXPECT_EQ(store.stats().missed(MissReason::io), 3);
  DiskStore second(scratch.store(), kFingerprint, {.quota_bytes = 1});
  EXPECT_EQ(second.stats().records, 0);
  EXPECT_EQ(read_file(scratch.store() + "/notes.txt"), "somebody's");
  EXPECT_TRUE(std::filesystem::exists(outside));
}

// ---- what the system refuses ----

struct Injection {
  const char* call;
  int error;
  WriteFailure reason;
};

TEST_F(DiskStoreDamage, AFailedWriteIsCountedLeavesNoFileAndDoesNotStopTheStore) {
  const Injection injections[] = {
      {"write", ENOSPC, WriteFailure::no_space}, {"write", EDQUOT, WriteFailure::no_space},
      {"write", EIO, WriteFailure::io},          {"fsync", EIO, WriteFailure::io},
      {"fsync", ENOSPC, WriteFailure::no_space}, {"rename", ENOSPC, WriteFailure::no_space},
      {"rename", EROFS, WriteFailure::access},   {"write", EFBIG, WriteFailure::other},
  };
  for (const Injection& injection : injections) {
    const Scratch scratch;
    std::atomic<bool> failing = true;
    std::atomic<int> calls = 0;
    const auto fails = [&](const char* call) {
      if (std::string_view(call) != injection.call || !failing) return false;
      ++calls;
      errno = injection.error;
      return true;
    };
    DiskStoreOptions options = megabytes(8);
    options.calls.write = [&](int descriptor, const void* from, std::size_t bytes) -> ssize_t {
      // Half of it fits: what was written is as lost as what was not.
      if (failing && bytes > 1) return ::write(descriptor, from, bytes / 2);
      return fails("write") ? -1 : ::write(descriptor, from, bytes);
    };
    options.calls.fsync = [&](int descriptor) { return fails("fsync") ? -1 : ::fsync(descriptor); };
    options.calls.rename = [&](int folder, const char* from, const char* to) {
      return fails("rename") ? -1 : ::renameat(folder, from, folder, to);
    };
    DiskStore store(scratch.store(), kFingerprint, options);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(put(store, chunk(i)), PutResult::queued);
    store.flush();
    EXPECT_EQ(store.stats().failed(injection.reason), 3) << injection.call << ' ' << injection.error;
    EXPECT_EQ(store.stats().writes, 0);
    EXPECT_GE(calls, 3);
    EXPECT_TRUE(scratch.names().empty()) << injection.call;
    EXPECT_FALSE(serves(store, chunk(1)));
    failing = false;
    EXPECT_EQ(put(store, chunk(1)), PutResult::queued);
    store.flush();
    EXPECT_TRUE(serves(store, chunk(1)));
  }
}

TEST_F(DiskStoreDamage, InterruptedAndShortCallsAreContinued) {
  const Scratch scratch;
  DiskStoreOptions options = megabytes(8);
  std::atomic<int> count = 0;
  options.calls.write = [&](int descriptor, const void* from, std::size_t bytes) -> ssize_t {
    if (++count % 3 != 0) return ::write(descriptor, from, std::min<std::size_t>(bytes, 100));
    errno = EINTR;
    return -1;
  };
  options.calls.pread = [&](int descriptor, void* to, std::size_t bytes, off_t offset) -> ssize_t {
    if (++count % 3 != 0) return ::pread(descriptor, to, std::min<std::size_t>(bytes, 100), offset);
    errno = EINTR;
    return -1;
  };
  DiskStore store(scratch.store(), kFingerprint, options);
  put(store, chunk(1));
  store.flush();
  EXPECT_TRUE(serves(store, chunk(1)));
  EXPECT_GT(count, 100);
}

TEST_F(DiskStoreDamage, AReadErrorIsAMissAndTheFileStays) {
  const Scratch scratch;
  std::atomic<int> reads_until_failure = -1;
  DiskStoreOptions options = megabytes(8);
  options.calls.pread = [&](int descriptor, void* to, std::size_t bytes, off_t offset) -> ssize_t {
    if (reads_until_failure-- != 0) return ::pread(descriptor, to, bytes, offset);
    errno = EIO;
    return -1;
  };
  DiskStore store(scratch.store(), kFingerprint, options);
  put(store, chunk(1));
  store.flush();
  for (int i = 0; i < 4; ++i) {  // the head, and each of three blocks
    reads_until_failure = i;
    EXPECT_FALSE(store.open(chunk(1).key, chunk(1).tokens)) << i;
    EXPECT_EQ(store.stats().missed(MissReason::io), i + 1);
  }
  reads_until_failure = -1;
  EXPECT_TRUE(serves(store, chunk(1)));
}

// ---- permissions ----

TEST_F(DiskStoreDamage, OnlyTheOwnerMayReadWhateverTheMask) {
  for (const mode_t mask : {mode_t{0}, mode_t{0277}}) {
    const Scratch scratch;
    const mode_t before = ::umask(mask);
    {
      if (mask != 0) std::filesystem::create_directory(scratch.store()), ::chmod(scratch.store().c_str(), 0700);
      DiskStore store(scratch.store(), kFingerprint, megabytes(8));
      put(store, chunk(1));
      store.flush();
      struct stat status {};
      ASSERT_EQ(::stat(scratch.store().c_str(), &status), 0);
      EXPECT_EQ(status.st_mode & 0777, 0700u);
      ASSERT_EQ(::stat(scratch.only_file().c_str(), &status), 0);
      EXPECT_EQ(status.st_mode & 0777, 0600u);
      store.pin(chunk(1).key, true);
      ASSERT_EQ(::stat(scratch.only_file().c_str(), &status), 0);
      EXPECT_EQ(status.st_mode & 0777, 0400u);
      store.pin(chunk(1).key, false);
      ASSERT_EQ(::stat(scratch.only_file().c_str(), &status), 0);
      EXPECT_EQ(status.st_mode & 0777, 0600u);
    }
    ::umask(before);
  }
}

TEST_F(DiskStoreDamage, ADirectoryThatCannotBeUsedIsAnErrorThatNamesIt) {
  const Scratch scratch;
  write_file(scratch.folder() + "/file", "x");
  const auto message_for = [&](const std::string& path) -> std::string {
    try {
      DiskStore store(path, kFingerprint, megabytes(1));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::io);
      return error.what();
    }
    return "nothing was thrown";
  };
  for (const std::string& path : {scratch.folder() + "/file", scratch.folder() + "/file/below"}) {
    EXPECT_NE(message_for(path).find(path), std::string::npos) << message_for(path);
  }
  EXPECT_EQ(code_of([] { DiskStore store("", kFingerprint, megabytes(1)); }), ErrorCode::io);
  DiskStore nested(scratch.folder() + "/a/b/c", kFingerprint, megabytes(1));
  EXPECT_TRUE(std::filesystem::is_directory(scratch.folder() + "/a/b/c"));
}

/// The same as another user, since root may write everywhere.
class AsNobody {
 public:
  AsNobody() : was_root_(::geteuid() == 0) {
    if (was_root_ && ::seteuid(65534) != 0) throw std::runtime_error("seteuid failed");
  }
  ~AsNobody() {
    if (was_root_ && ::seteuid(0) != 0) std::abort();
  }

 private:
  bool was_root_;
};

TEST_F(DiskStoreDamage, ADirectoryThatMayNotBeWrittenServesWhatItHas) {
  const Scratch scratch;
  ASSERT_EQ(::chmod(scratch.folder().c_str(), 0777), 0);
  const AsNobody nobody;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  put(store, chunk(1));
  store.flush();
  ASSERT_EQ(::chmod(scratch.store().c_str(), 0500), 0);
  EXPECT_EQ(put(store, chunk(2)), PutResult::queued);
  store.flush();
  EXPECT_EQ(store.stats().failed(WriteFailure::access), 1);
  EXPECT_TRUE(serves(store, chunk(1)));
  EXPECT_FALSE(store.erase(chunk(1).key));
  // A new store would not be able to write: that is said at once.
  EXPECT_EQ(code_of([&] { DiskStore second(scratch.store(), kFingerprint, megabytes(1)); }), ErrorCode::io);
  ASSERT_EQ(::chmod(scratch.store().c_str(), 0700), 0);
  EXPECT_EQ(put(store, chunk(2)), PutResult::queued);
  store.flush();
  EXPECT_TRUE(serves(store, chunk(2)));
}

// ---- processes that die ----

TEST_F(DiskStoreDamage, ATemporaryFileOfALivingWriterStaysOfADeadOneGoes) {
  const Scratch scratch;
  WriteGate gate;
  DiskStoreOptions options = megabytes(8);
  gate.guard(options);
  DiskStore store(scratch.store(), kFingerprint, options);
  put(store, chunk(1));
  gate.wait_until_reached();
  EXPECT_TRUE(has_temporary(scratch));
  write_file(scratch.store() + "/.writing-1-2-3", "left behind");
  {
    DiskStore second(scratch.store(), kFingerprint, megabytes(8));
    EXPECT_EQ(second.stats().temporaries_removed, 1);
  }
  EXPECT_EQ(scratch.names().size(), 1u);
  gate.open();
  store.flush();
  EXPECT_TRUE(serves(store, chunk(1)));
  EXPECT_FALSE(has_temporary(scratch));
}

/// Writes records until it is killed.
[[noreturn]] void write_for_ever(const std::string& folder, std::int64_t quota, int seed) {
  try {
    DiskStore store(folder, kFingerprint, {.quota_bytes = quota});
    for (int i = seed; true; ++i) {
      put(store, i % 3 == 0 ? link(i, 0) : chunk(i, 1 + static_cast<std::size_t>(i * 37 % 400)));
      if (i % 4 == 0) store.flush();
    }
  } catch (...) {
  }
  ::_exit(1);
}

TEST_F(DiskStoreDamage, KilledTwoHundredTimesWhileWriting) {
  const Scratch scratch;
  constexpr std::int64_t kQuota = 300'000;
  std::mt19937 random(4);
  int interrupted = 0;
  std::int64_t served = 0;
  for (int round = 0; round < 200; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) write_for_ever(scratch.store(), kQuota, round * 500);
    std::this_thread::sleep_for(std::chrono::microseconds(3000 + random() % 9000));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    if (!std::filesystem::exists(scratch.store())) continue;  // killed before anything
    interrupted += has_temporary(scratch) ? 1 : 0;

    DiskStore store(scratch.store(), kFingerprint, {.quota_bytes = kQuota});
    ASSERT_FALSE(has_temporary(scratch));
    ASSERT_LE(scratch.bytes(), kQuota);
    ASSERT_EQ(store.stats().damaged_removed, 0);  // a name never stands for half a record
    for (const RecordPtr& record : store.records(digest_of(""))) ASSERT_TRUE(serves(store, *record));
    ASSERT_EQ(all_misses(store), 0);
    served += store.stats().hits;
  }
  RecordProperty("interrupted", interrupted);
  EXPECT_GE(interrupted, 20);  // or nothing was tested
  EXPECT_GT(served, 200);
}

}  // namespace
}  // namespace nb::kv
