// What the disk store keeps, finds and gives up when nothing goes wrong.
#include "kv/disk_store.h"

#include <gtest/gtest.h>

#include <set>

#include "base/code_of.h"
#include "base/error.h"
#include "kv/disk_scratch.h"

namespace nb::kv {
namespace {

using PutResult = DiskStore::PutResult;

std::set<std::string> keys_of(const std::vector<RecordPtr>& records) {
  std::set<std::string> keys;
  for (const RecordPtr& record : records) keys.insert(to_hex(record->key));
  return keys;
}

TEST(DiskStore, GivesBackWhatWasPutAfterARestart) {
  const Scratch scratch;
  const std::vector<RecordInfo> infos = {chunk(1, 1), chunk(2, 16), chunk(3, 17),  chunk(4, 5000),
                                         link(1, 0),  link(1, 1),   link(1, 2, 16)};
  {
    DiskStore store(scratch.store(), kFingerprint, megabytes(64));
    for (const RecordInfo& info : infos) EXPECT_EQ(put(store, info), PutResult::queued);
  }
  DiskStore store(scratch.store(), kFingerprint, megabytes(64));
  EXPECT_EQ(store.stats().records, std::ssize(infos));
  EXPECT_EQ(store.stats().bytes, scratch.bytes());
  for (const RecordInfo& info : infos) {
    const std::optional<DiskRecord> record = store.open(info.key, info.tokens);
    ASSERT_TRUE(record);
    EXPECT_TRUE(is_right(*record));
    EXPECT_EQ(record->num_blocks(), info.num_blocks());
    const RecordInfo& read = record->info();
    EXPECT_EQ(read.kind, info.kind);
    EXPECT_EQ(read.root, info.root);
    EXPECT_EQ(read.parent, info.parent);
    EXPECT_EQ(read.key, info.key);
    EXPECT_EQ(read.position, info.position);
    EXPECT_EQ(read.tokens, info.tokens);
    EXPECT_EQ(read.metadata, info.metadata);
    EXPECT_EQ(read.block_bytes, info.block_bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(record->block(0).data()) % kStoreAlignment, 0u);
    EXPECT_EQ(code_of([&] { record->block(info.num_blocks()); }), ErrorCode::invalid_argument);
  }
  EXPECT_EQ(store.stats().hits, std::ssize(infos));
  EXPECT_EQ(all_misses(store), 0);
}

TEST(DiskStore, LoadsIntoMemoryOfTheCaller) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  const RecordInfo info = chunk(1, 40);
  put(store, info);
  store.flush();
  std::vector<std::vector<std::byte>> memory(3, std::vector<std::byte>(kBlockBytes));
  std::vector<std::span<std::byte>> blocks(memory.begin(), memory.end());
  EXPECT_TRUE(store.load(info.key, info.tokens, blocks));
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(memory[i], content(info.key, i));
  EXPECT_EQ(store.stats().hits, 1);
  EXPECT_EQ(store.stats().bytes_read, 3 * static_cast<std::int64_t>(kBlockBytes));
  // Blocks of another shape: never a part of one.
  std::vector<std::byte> large(kBlockBytes + 1);
  blocks[1] = large;
  EXPECT_FALSE(store.load(info.key, info.tokens, blocks));
  EXPECT_EQ(store.stats().missed(MissReason::fingerprint), 1);
  EXPECT_EQ(code_of([&] { store.load(info.key, info.tokens, std::span(blocks).first(2)); }),
            ErrorCode::invalid_argument);
}

TEST(DiskStore, FollowsAChainFromItsRoot) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(16));
  for (int i = 0; i < 4; ++i) put(store, link(1, i));
  put(store, link(2, 0));
  put(store, chunk(1));
  store.flush();
  EXPECT_EQ(keys_of(store.children(digest_of(""))),
            (std::set{to_hex(link(1, 0).key), to_hex(link(2, 0).key), to_hex(chunk(1).key)}));
  Digest at = digest_of("");
  std::size_t restored = 0;
  for (int i = 0; i < 4; ++i) {
    const std::optional<DiskStore::Match> match = store.match(at, link(1, i).tokens);
    ASSERT_TRUE(match);
    EXPECT_EQ(match->num_tokens, kMaxPrefixTokens);
    EXPECT_EQ(match->record->position, restored);
    EXPECT_TRUE(serves(store, *match->record));
    at = match->record->key;
    restored += match->num_tokens;
  }
  EXPECT_TRUE(store.children(at).empty());
  EXPECT_FALSE(store.match(at, link(1, 0).tokens));
}

TEST(DiskStore, MatchesAndReadsALeadingPartOfAPrefixInWholeBlocks) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  const RecordInfo info = link(1, 0);
  put(store, info);
  put(store, chunk(1, 48));
  store.flush();
  std::vector<TokenId> tokens(info.tokens.begin(), info.tokens.begin() + 100);
  tokens[70] = -1;
  const std::optional<DiskStore::Match> match = store.match(info.parent, tokens);
  ASSERT_TRUE(match);
  EXPECT_EQ(match->num_tokens, 64u);
  const std::optional<DiskRecord> record = store.open(info.key, std::span(tokens).first(64));
  ASSERT_TRUE(record);
  EXPECT_EQ(record->num_blocks(), 4u);
  EXPECT_TRUE(is_right(*record));
  EXPECT_FALSE(store.open(info.key, std::span(tokens).first(60)));  // no whole blocks
  EXPECT_FALSE(store.open(info.key, {}));
  EXPECT_FALSE(
      store.open(chunk(1, 48).key, std::span<const TokenId>(chunk(1, 48).tokens).first(16)));  // a chunk is one piece
  EXPECT_EQ(store.stats().missed(MissReason::tokens), 3);
  tokens[3] = -1;
  EXPECT_FALSE(store.match(info.parent, tokens));
}

TEST(DiskStore, AKeyWithOtherTokensIsAMissAndStays) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  put(store, chunk(1));
  put(store, link(1, 0));
  store.flush();
  for (const RecordInfo& info : {chunk(1), link(1, 0)}) {
    for (const std::size_t at : {std::size_t{0}, std::size_t{17}, info.tokens.size() - 1}) {
      std::vector<TokenId> tokens = info.tokens;
      tokens[at] ^= 1 << 30;
      EXPECT_FALSE(store.open(info.key, tokens));
    }
    std::vector<TokenId> longer = info.tokens;
    longer.resize(longer.size() + 16, 7);
    EXPECT_FALSE(store.open(info.key, longer));
  }
  EXPECT_EQ(store.stats().missed(MissReason::tokens), 8);
  EXPECT_EQ(all_misses(store), 8);
  EXPECT_TRUE(serves(store, chunk(1)));
  EXPECT_TRUE(serves(store, link(1, 0)));
}

TEST(DiskStore, AnotherFingerprintFindsNothingAndRemovesNothing) {
  const Scratch scratch;
  const Digest edited = digest_of("the same model, one weight edited");
  {
    DiskStore store(scratch.store(), kFingerprint, megabytes(1));
    put(store, chunk(1));
    put(store, link(1, 0));
  }
  {
    DiskStore store(scratch.store(), edited, megabytes(1));
    EXPECT_EQ(store.stats().records, 0);
    EXPECT_EQ(store.stats().foreign_records, 2);
    EXPECT_EQ(store.stats().bytes, scratch.bytes());
    EXPECT_EQ(store.find(chunk(1).key), nullptr);
    EXPECT_TRUE(store.children(digest_of("")).empty());
    EXPECT_TRUE(store.records(digest_of("")).empty());
    EXPECT_FALSE(serves(store, chunk(1)));
    EXPECT_FALSE(serves(store, chunk(2)));
    EXPECT_EQ(store.stats().missed(MissReason::fingerprint), 1);
    EXPECT_EQ(store.stats().missed(MissReason::absent), 1);
    // Both may keep a record of one key.
    EXPECT_EQ(put(store, chunk(1)), PutResult::queued);
    store.flush();
    EXPECT_TRUE(serves(store, chunk(1)));
  }
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  EXPECT_TRUE(serves(store, chunk(1)));
  EXPECT_TRUE(serves(store, link(1, 0)));
  // A file that was given our name: its head is believed, not its name.
  const std::string own = scratch.store() + "/" + record_file_name(chunk(1).key, kFingerprint);
  std::filesystem::rename(scratch.store() + "/" + record_file_name(chunk(1).key, edited), own);
  EXPECT_FALSE(serves(store, chunk(1)));
  EXPECT_EQ(store.stats().missed(MissReason::fingerprint), 1);
  EXPECT_TRUE(std::filesystem::exists(own));
}

TEST(DiskStore, ARecordUnderTheNameOfAnotherKeyIsRemoved) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  put(store, chunk(1));
  store.flush();
  std::filesystem::rename(scratch.only_file(), scratch.store() + "/" + record_file_name(chunk(2).key, kFingerprint));
  EXPECT_FALSE(store.open(chunk(2).key, chunk(1).tokens));
  EXPECT_EQ(store.stats().missed(MissReason::checksum), 1);
  EXPECT_TRUE(scratch.names().empty());
}

TEST(DiskStore, ListsOneNamespaceOnly) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  put(store, chunk(1, 40, "alice"));
  put(store, chunk(2, 40, "alice"));
  put(store, chunk(3, 40, "bob"));
  store.flush();
  EXPECT_EQ(keys_of(store.records(digest_of("alice"))), (std::set{to_hex(chunk(1).key), to_hex(chunk(2).key)}));
  EXPECT_EQ(keys_of(store.records(digest_of("bob"))), (std::set{to_hex(chunk(3).key)}));
  EXPECT_EQ(keys_of(store.children(digest_of("bob"))), (std::set{to_hex(chunk(3).key)}));
  EXPECT_TRUE(store.records(digest_of("")).empty());
}

TEST(DiskStore, TwoStoresOverOneDirectorySeeEachOther) {
  const Scratch scratch;
  DiskStoreOptions fast = megabytes(4);
  fast.calls.fsync = [](int) { return 0; };
  DiskStore a(scratch.store(), kFingerprint, fast);
  DiskStore b(scratch.store(), kFingerprint, megabytes(4));
  put(a, chunk(1));
  a.flush();
  EXPECT_TRUE(serves(b, chunk(1)));
  ASSERT_NE(b.find(chunk(1).key), nullptr);
  EXPECT_EQ(put(b, chunk(1)), PutResult::present);
  for (int i = 0; i < 20; ++i) {  // within one tick of the file system's clock, too
    put(a, link(i, 0));
    a.flush();
    EXPECT_EQ(std::ssize(b.children(digest_of(""))), i + 2);
    EXPECT_TRUE(b.match(digest_of(""), link(i, 0).tokens));
  }
  EXPECT_TRUE(b.erase(chunk(1).key));
  EXPECT_FALSE(serves(a, chunk(1)));
  EXPECT_EQ(a.stats().missed(MissReason::absent), 1);
  EXPECT_EQ(put(a, chunk(1)), PutResult::queued);
  a.flush();
  EXPECT_TRUE(serves(b, chunk(1)));
}

TEST(DiskStore, PrefetchOfAnythingIsHarmless) {
  const Scratch scratch;
  DiskStore store(scratch.store(), kFingerprint, megabytes(1));
  put(store, chunk(1));
  store.flush();
  store.prefetch(chunk(1).key);
  store.prefetch(chunk(2).key);
  EXPECT_EQ(all_misses(store) + store.stats().hits, 0);
  EXPECT_TRUE(serves(store, chunk(1)));
}

}  // namespace
}  // namespace nb::kv
