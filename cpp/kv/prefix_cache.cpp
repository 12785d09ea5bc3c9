#include "kv/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "base/hash_field.h"

namespace nb::kv {

namespace {

std::string_view bytes_of(const Digest& digest) {
  return {reinterpret_cast<const char*>(digest.data()), digest.size()};
}

std::span<const TokenId> block_tokens(std::span<const TokenId> tokens, std::size_t index) {
  return tokens.subspan(index * kBlockTokens, kBlockTokens);
}

}  // namespace

Digest PrefixCache::chain_key(const Digest& parent, std::span<const TokenId> tokens) {
  static_assert(std::endian::native == std::endian::little);
  Sha256 hash;
  hash.update(parent);
  hash.update(std::as_bytes(tokens));
  return hash.finish();
}

PrefixCache::PrefixCache(BlockPool& pool, std::string_view fingerprint, KeyFunction key) : pool_(pool), key_(key) {
  Sha256 hash;
  add_field(hash, "fingerprint", fingerprint);
  fingerprint_ = hash.finish();
  // Room for every block, so that publishing never allocates; memory becomes resident with use.
  entries_.reserve(static_cast<std::size_t>(pool.num_blocks()));
  tokens_.reserve(static_cast<std::size_t>(pool.num_blocks()) * kBlockTokens);
  buckets_.assign(std::bit_ceil(2 * static_cast<std::size_t>(pool.num_blocks())), kNoBlock);
}

PrefixRoot PrefixCache::root(std::string_view salt) const {
  Sha256 hash;
  add_field(hash, "fingerprint", bytes_of(fingerprint_));
  add_field(hash, "namespace", salt);
  return hash.finish();
}

int PrefixCache::extend(PrefixKeys& keys, std::span<const TokenId> tokens, int max_blocks,
                        std::vector<BlockId>& chain) {
  forget_evicted();
  const std::size_t before = chain.size();
  const std::size_t most = std::min(static_cast<std::size_t>(std::max(max_blocks, 0)), tokens.size() / kBlockTokens);
  while (chain.size() < most) {
    const BlockId parent = chain.empty() ? kNoBlock : chain.back();
    NB_ASSERT(parent == kNoBlock || is_published(parent));
    const Digest& parent_key = parent == kNoBlock ? keys.root : entry(parent).key;
    const std::span<const TokenId> wanted = block_tokens(tokens, chain.size());
    const BlockId found = find(key_of(keys, tokens, chain.size()), parent_key, parent, wanted);
    if (found == kNoBlock) break;
    chain.push_back(found);
    pool_.add_ref(found);
  }
  return static_cast<int>(chain.size() - before);
}

int PrefixCache::match(PrefixKeys& keys, std::span<const TokenId> tokens, int max_blocks) {
  forget_evicted();
  const std::size_t most = std::min(static_cast<std::size_t>(std::max(max_blocks, 0)), tokens.size() / kBlockTokens);
  std::size_t count = 0;
  for (BlockId parent = kNoBlock; count < most; ++count) {
    const Digest& parent_key = parent == kNoBlock ? keys.root : entry(parent).key;
    parent = find(key_of(keys, tokens, count), parent_key, parent, block_tokens(tokens, count));
    if (parent == kNoBlock) break;
  }
  return static_cast<int>(count);
}

BlockId PrefixCache::publish(PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> chain) {
  forget_evicted();
  NB_ASSERT(!chain.empty() && tokens.size() == chain.size() * kBlockTokens);
  const BlockId block = chain.back();
  const BlockId parent = chain.size() > 1 ? chain[chain.size() - 2] : kNoBlock;
  NB_ASSERT(parent == kNoBlock || is_published(parent));
  NB_ASSERT(!is_published(block));
  if (static_cast<std::size_t>(block) >= entries_.size()) {
    entries_.resize(static_cast<std::size_t>(block) + 1);
    tokens_.resize(entries_.size() * kBlockTokens);
  }
  const Digest& parent_key = parent == kNoBlock ? keys.root : entry(parent).key;
  const std::span<const TokenId> own = block_tokens(tokens, chain.size() - 1);
  const Digest& key = key_of(keys, tokens, chain.size() - 1);
  if (const BlockId found = find(key, parent_key, parent, own); found != kNoBlock) return found;
  pool_.keep(block);
  BlockId& head = buckets_[bucket_of(key)];
  entry(block) = {
      .key = key, .parent_key = parent_key, .parent = parent, .next = head, .num_children = 0, .published = true};
  head = block;
  std::copy(own.begin(), own.end(), tokens_.begin() + static_cast<std::ptrdiff_t>(block) * kBlockTokens);
  if (parent != kNoBlock) ++entry(parent).num_children;
  ++num_published_;
  return block;
}

/// The key of block `index` of a sequence with these tokens.
const Digest& PrefixCache::key_of(PrefixKeys& keys, std::span<const TokenId> tokens, std::size_t index) const {
  for (std::size_t next = keys.keys.size(); next <= index; ++next) {
    keys.keys.push_back(key_(next == 0 ? keys.root : keys.keys.back(), block_tokens(tokens, next)));
  }
  return keys.keys[index];
}

bool PrefixCache::is_published(BlockId block) const {
  return static_cast<std::size_t>(block) < entries_.size() && entry(block).published;
}

/// Follows what the pool gave away.
void PrefixCache::forget_evicted() {
  for (const BlockId block : pool_.evicted()) forget(block);
  pool_.clear_evicted();
}

void PrefixCache::forget(BlockId block) {
  Entry& old = entry(block);
  NB_ASSERT(old.published && old.num_children == 0);
  BlockId* link = &buckets_[bucket_of(old.key)];
  while (*link != block) link = &entry(*link).next;
  *link = old.next;
  if (old.parent != kNoBlock) --entry(old.parent).num_children;
  old.published = false;
  --num_published_;
}

std::size_t PrefixCache::bucket_of(const Digest& key) const {
  std::uint64_t value = 0;
  std::memcpy(&value, key.data(), sizeof(value));
  return static_cast<std::size_t>(value) & (buckets_.size() - 1);
}

BlockId PrefixCache::find(const Digest& key, const Digest& parent_key, BlockId parent,
                          std::span<const TokenId> tokens) const {
  for (BlockId block = buckets_[bucket_of(key)]; block != kNoBlock; block = entry(block).next) {
    const Entry& candidate = entry(block);
    if (candidate.key != key || candidate.parent != parent || candidate.parent_key != parent_key) continue;
    const std::span<const TokenId> stored = tokens_of(block);
    if (std::equal(stored.begin(), stored.end(), tokens.begin(), tokens.end())) return block;
  }
  return kNoBlock;
}

std::span<const TokenId> PrefixCache::tokens_of(BlockId block) const {
  return block_tokens(tokens_, static_cast<std::size_t>(block));
}

void PrefixCache::check_invariants() {
  forget_evicted();
  int listed = 0;
  for (std::size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    for (BlockId block = buckets_[bucket]; block != kNoBlock; block = entry(block).next) {
      NB_ASSERT(entry(block).published && bucket_of(entry(block).key) == bucket);
      ++listed;
    }
  }
  NB_ASSERT(listed == num_published_);
  std::vector<int> children(entries_.size(), 0);
  for (BlockId block = 0; block < pool_.num_blocks(); ++block) {
    NB_CHECK(is_published(block) == pool_.is_kept(block), internal, "KV block ", block, " is ",
             is_published(block) ? "published but not kept" : "kept but not published");
    if (!is_published(block) || entry(block).parent == kNoBlock) continue;
    const BlockId parent = entry(block).parent;
    NB_ASSERT(is_published(parent) && entry(parent).key == entry(block).parent_key);
    NB_CHECK(pool_.ref_count(parent) >= pool_.ref_count(block), internal, "KV block ", block,
             " has more owners than the block before it, ", parent);
    ++children[static_cast<std::size_t>(parent)];
  }
  for (std::size_t i = 0; i < children.size(); ++i) {
    NB_ASSERT(!entries_[i].published || entries_[i].num_children == children[i]);
  }
}

}  // namespace nb::kv
