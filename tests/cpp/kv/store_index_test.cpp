#include "kv/store_index.h"

#include <gtest/gtest.h>

#include "kv/disk_scratch.h"

namespace nb::kv {
namespace {

using Names = std::vector<std::string>;

StoreEntry entry(const RecordInfo& info, std::int64_t used_at_ns, bool pinned = false) {
  return {.record = std::make_shared<const RecordInfo>(info), .bytes = 10, .used_at_ns = used_at_ns, .pinned = pinned};
}

TEST(StoreIndex, NamesOfRecordsAreTheirKeysAndNoOthersAreTaken) {
  const std::string name = record_file_name(digest_of("key"), digest_of("fingerprint"));
  EXPECT_TRUE(is_record_file_name(name));
  EXPECT_TRUE(
      name.starts_with(to_hex(digest_of("key")) + "-" + to_hex(digest_of("fingerprint")).substr(0, 16) + ".kv"));
  EXPECT_TRUE(is_record_file_name(name.substr(0, name.size() - 1) + "27"));  // a later version
  std::string upper = name;
  upper[3] = 'A';
  for (const std::string& other : {std::string(), std::string("notes.txt"), name.substr(1), name + "x", "." + name,
                                   name.substr(0, name.size() - 1), upper}) {
    EXPECT_FALSE(is_record_file_name(other)) << other;
  }
}

TEST(StoreIndex, CountsWhatIsThere) {
  StoreIndex index;
  index.set("a", entry(chunk(1, 40, "x"), 1));
  index.set("b", entry(chunk(2, 40, "y"), 1));
  index.set("foreign", {.record = nullptr, .bytes = 7});
  EXPECT_EQ(index.bytes(), 27);
  EXPECT_EQ(index.num_own(), 2);
  EXPECT_EQ(index.bytes_of(digest_of("x")), 10);
  index.set("a", entry(chunk(3, 40, "x"), 1));  // replaced
  EXPECT_EQ(index.bytes(), 27);
  ASSERT_EQ(index.children(digest_of("x")).size(), 1u);
  EXPECT_EQ(index.children(digest_of("x"))[0]->key, chunk(3).key);
  index.remove("a");
  index.remove("a");
  EXPECT_EQ(index.bytes(), 17);
  EXPECT_TRUE(index.children(digest_of("x")).empty());
  EXPECT_EQ(index.find("a"), nullptr);
}

TEST(StoreIndex, GivesUpTheEndsOfChainsFirstAndNothingPinned) {
  StoreIndex index;
  for (int i = 0; i < 3; ++i) index.set(concat("link", i), entry(link(1, i), 10 + i));
  index.set("old", {.record = nullptr, .bytes = 1, .used_at_ns = 5});
  index.set("middle", entry(chunk(1), 11));
  index.set("new", entry(chunk(2, 40, "x"), 20));
  EXPECT_EQ(index.eviction_order(nullptr), (Names{"old", "middle", "link2", "link1", "link0", "new"}));
  const Digest x = digest_of("x");
  EXPECT_EQ(index.eviction_order(&x), Names{"new"});
  index.set_used("link1", 11, true);
  EXPECT_EQ(index.eviction_order(nullptr), (Names{"old", "middle", "link2", "new"}));
  index.set_used("link1", 30, false);
  EXPECT_EQ(index.eviction_order(nullptr), (Names{"old", "middle", "link2", "new", "link1", "link0"}));
}

TEST(StoreIndex, RecordsThatClaimToFollowEachOtherEndTheWalk) {
  StoreIndex index;
  RecordInfo a = link(1, 0), b = link(1, 1);
  a.parent = b.key;
  RecordInfo self = link(2, 0);
  self.parent = self.key;
  index.set("a", entry(a, 1));
  index.set("b", entry(b, 2));
  index.set("self", entry(self, 3));
  EXPECT_EQ(index.eviction_order(nullptr), (Names{"b", "a", "self"}));
}

}  // namespace
}  // namespace nb::kv
