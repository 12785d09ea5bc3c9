#include "engine/save_queue.h"

#include <algorithm>

#include "base/error.h"

namespace nb::engine {

namespace {

constexpr std::size_t kRecordBlocks = kv::kMaxPrefixTokens / kBlockTokens;

}  // namespace

void SaveQueue::add_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens,
                           std::span<const BlockId> blocks) {
  const std::size_t count = blocks.size();
  NB_ASSERT(keys.keys.size() >= count && tokens.size() >= count * kBlockTokens);
  if (blocks.empty()) return;
  const auto last_key = keys.keys.begin() + static_cast<std::ptrdiff_t>(count);
  const auto last_token = tokens.begin() + static_cast<std::ptrdiff_t>(count * kBlockTokens);
  items_.push_back({.kind = kv::RecordKind::prefix,
                    .root = keys.root,
                    .keys = {keys.keys.begin(), last_key},
                    .tokens = {tokens.begin(), last_token},
                    .blocks = {blocks.begin(), blocks.end()}});
  for (const BlockId block : blocks) pool_.add_ref(block);
}

void SaveQueue::add_chunk(const kv::Chunk& chunk) {
  items_.push_back({.kind = kv::RecordKind::chunk,
                    .root = chunk.root,
                    .keys = {chunk.key},
                    .tokens = chunk.tokens,
                    .blocks = chunk.blocks});
  for (const BlockId block : chunk.blocks) pool_.add_ref(block);
}

/// Block behind the next record of an item.
std::size_t SaveQueue::end_of(const Item& item) {
  if (item.kind == kv::RecordKind::chunk) return item.blocks.size();
  return std::min(item.num_done + kRecordBlocks, item.blocks.size());
}

SaveRecord SaveQueue::front() const {
  const Item& item = items_.front();
  const std::size_t begin = item.num_done, end = end_of(item);
  const bool is_chunk = item.kind == kv::RecordKind::chunk;
  const std::size_t last_token = std::min(end * kBlockTokens, item.tokens.size());
  const std::size_t first_token = begin * kBlockTokens;
  return {.kind = item.kind,
          .root = item.root,
          .parent = begin == 0 ? item.root : item.keys[begin - 1],
          .key = is_chunk ? item.keys[0] : item.keys[end - 1],
          .position = static_cast<int>(first_token),
          .tokens = std::span(item.tokens).subspan(first_token, last_token - first_token),
          .blocks = std::span(item.blocks).subspan(begin, end - begin)};
}

void SaveQueue::pop(std::vector<BlockId>& freed) {
  Item& item = items_.front();
  item.num_done = end_of(item);
  if (item.num_done < item.blocks.size()) return;
  release(item, freed);
  items_.pop_front();
}

bool SaveQueue::drop_one(std::vector<BlockId>& freed) {
  if (items_.empty()) return false;
  release(items_.back(), freed);
  items_.pop_back();
  ++num_dropped_;
  return true;
}

void SaveQueue::drop_chunk(const Digest& key, std::vector<BlockId>& freed) {
  for (auto item = items_.begin(); item != items_.end();) {
    if (item->kind != kv::RecordKind::chunk || item->keys[0] != key) {
      ++item;
      continue;
    }
    release(*item, freed);
    item = items_.erase(item);
  }
}

/// Last block first, as a sequence gives them back.
void SaveQueue::release(const Item& item, std::vector<BlockId>& freed) {
  for (auto block = item.blocks.rbegin(); block != item.blocks.rend(); ++block) {
    if (pool_.release(*block)) freed.push_back(*block);
  }
}

void SaveQueue::append_owners(std::vector<BlockId>& owners) const {
  for (const Item& item : items_) owners.insert(owners.end(), item.blocks.begin(), item.blocks.end());
}

}  // namespace nb::engine
