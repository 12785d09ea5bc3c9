#include "kv/chunk_store.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "base/hash_field.h"

namespace nb::kv {

namespace {

void add_tokens(Sha256& hash, std::span<const TokenId> tokens) {
  const std::uint64_t count = tokens.size();
  hash.update(std::as_bytes(std::span(&count, 1)));
  hash.update(std::as_bytes(tokens));
}

bool has_content(const Chunk& chunk, const ChunkContent& wanted) {
  const auto stored = std::span(chunk.tokens);
  const auto& anchor = wanted.anchor;
  if (chunk.root != wanted.root || chunk.anchor_len != static_cast<int>(anchor.size())) return false;
  const auto own = stored.subspan(anchor.size());
  return std::equal(anchor.begin(), anchor.end(), stored.begin()) &&
         std::equal(own.begin(), own.end(), wanted.tokens.begin(), wanted.tokens.end());
}

}  // namespace

Digest ChunkStore::root(std::string_view salt) {
  Sha256 hash;
  add_field(hash, "chunks", salt);
  return hash.finish();
}

Digest ChunkStore::key(const Digest& root, std::span<const TokenId> anchor, std::span<const TokenId> tokens) {
  static_assert(std::endian::native == std::endian::little);
  Sha256 hash;
  hash.update(root);
  add_tokens(hash, anchor);
  add_tokens(hash, tokens);
  return hash.finish();
}

ChunkId ChunkStore::find(const ChunkContent& wanted) const {
  const auto [begin, end] = by_key_.equal_range(wanted.key);
  const auto found =
      std::find_if(begin, end, [&](const auto& entry) { return has_content(chunks_.at(entry.second), wanted); });
  return found == end ? 0 : found->second;
}

void ChunkStore::count(ChunkId id, bool was_there) {
  Chunk& chunk = at(id);
  chunk.last_use = ++clock_;
  ++(was_there ? counters_.hits : counters_.misses);
  chunk.num_hits += was_there ? 1 : 0;
}

ChunkId ChunkStore::create(const ChunkContent& wanted) {
  NB_ASSERT(!wanted.tokens.empty() && find(wanted) == 0);
  const ChunkId id = next_id_++;
  Chunk& chunk = chunks_[id];
  chunk.id = id;
  chunk.root = wanted.root;
  chunk.key = wanted.key;
  chunk.tokens.assign(wanted.anchor.begin(), wanted.anchor.end());
  chunk.tokens.insert(chunk.tokens.end(), wanted.tokens.begin(), wanted.tokens.end());
  chunk.anchor_len = static_cast<int>(wanted.anchor.size());
  chunk.num_users = 1;
  chunk.last_use = ++clock_;
  by_key_.emplace(wanted.key, id);
  num_blocks_ += chunk.num_blocks();
  return id;
}

void ChunkStore::complete(ChunkId id, std::vector<BlockId> blocks, std::vector<BlockId>& freed) {
  Chunk& chunk = at(id);
  NB_ASSERT(!chunk.is_ready && static_cast<int>(blocks.size()) == chunk.num_blocks());
  chunk.blocks = std::move(blocks);
  chunk.is_ready = true;
  num_blocks_ -= chunk.num_blocks();
  for (const BlockId block : chunk.blocks) {
    if (num_holders(block)++ == 0) ++num_blocks_;
  }
  drop_if_unused(id, freed);
}

void ChunkStore::release(ChunkId id, std::vector<BlockId>& freed) {
  Chunk& chunk = at(id);
  NB_ASSERT(chunk.num_users > 0);
  --chunk.num_users;
  drop_if_unused(id, freed);
}

bool ChunkStore::remove(ChunkId id, std::vector<BlockId>& freed) {
  const auto found = chunks_.find(id);
  if (found == chunks_.end() || found->second.is_removed) return false;
  Chunk& chunk = found->second;
  const auto [begin, end] = by_key_.equal_range(chunk.key);
  by_key_.erase(std::find_if(begin, end, [&](const auto& entry) { return entry.second == id; }));
  chunk.is_removed = true;
  drop_if_unused(id, freed);
  return true;
}

bool ChunkStore::pin(ChunkId id, bool pinned) {
  const auto found = chunks_.find(id);
  if (found == chunks_.end() || found->second.is_removed) return false;
  found->second.is_pinned = pinned;
  return true;
}

bool ChunkStore::evict_one(std::vector<BlockId>& freed) {
  const Chunk* oldest = nullptr;
  for (const auto& [id, chunk] : chunks_) {
    if (!chunk.is_ready || chunk.is_pinned || chunk.num_users > 0) continue;
    if (oldest == nullptr || chunk.last_use < oldest->last_use) oldest = &chunk;
  }
  if (oldest == nullptr) return false;
  ++counters_.evictions;
  return remove(oldest->id, freed);
}

const Chunk& ChunkStore::get(ChunkId id) const {
  const auto found = chunks_.find(id);
  NB_CHECK(found != chunks_.end(), internal, "there is no chunk ", id);
  return found->second;
}

Chunk& ChunkStore::at(ChunkId id) { return const_cast<Chunk&>(get(id)); }

/// What was removed goes once nobody uses it. Whoever computes a chunk is one of its users.
void ChunkStore::drop_if_unused(ChunkId id, std::vector<BlockId>& freed) {
  Chunk& chunk = at(id);
  if (!chunk.is_removed || chunk.num_users > 0) return;
  // Last block first, as a sequence gives them back.
  for (auto block = chunk.blocks.rbegin(); block != chunk.blocks.rend(); ++block) {
    if (--num_holders(*block) == 0) --num_blocks_;
    if (pool_.release(*block)) freed.push_back(*block);
  }
  if (!chunk.is_ready) num_blocks_ -= chunk.num_blocks();
  chunks_.erase(id);
}

}  // namespace nb::kv
