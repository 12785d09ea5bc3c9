#include "kv/store_index.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "base/error.h"

namespace nb::kv {
namespace {

constexpr std::size_t kKeyDigits = 64;
constexpr std::size_t kFingerprintDigits = 16;
constexpr std::string_view kSuffix = ".kv";

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool is_number(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

std::string record_file_name(const Digest& key, const Digest& fingerprint) {
  return concat(to_hex(key), '-', to_hex(fingerprint).substr(0, kFingerprintDigits), kSuffix, kStoreVersion);
}

bool is_record_file_name(std::string_view name) {
  constexpr std::size_t kStem = kKeyDigits + 1 + kFingerprintDigits;
  return name.size() > kStem + kSuffix.size() && is_hex(name.substr(0, kKeyDigits)) && name[kKeyDigits] == '-' &&
         is_hex(name.substr(kKeyDigits + 1, kFingerprintDigits)) && name.substr(kStem, kSuffix.size()) == kSuffix &&
         is_number(name.substr(kStem + kSuffix.size()));
}

std::size_t StoreIndex::HashDigest::operator()(const Digest& digest) const {
  std::size_t value;  // a digest is as random as any hash of it
  std::memcpy(&value, digest.data(), sizeof(value));
  return value;
}

const StoreEntry* StoreIndex::find(const std::string& name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second;
}

void StoreIndex::set(const std::string& name, StoreEntry entry) {
  remove(name);
  bytes_ += entry.bytes;
  if (entry.record != nullptr) {
    ++num_own_;
    by_parent_.emplace(entry.record->parent, entry.record);
  }
  entries_.emplace(name, std::move(entry));
}

void StoreIndex::set_used(const std::string& name, std::int64_t used_at_ns, bool pinned) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return;
  found->second.used_at_ns = used_at_ns;
  found->second.pinned = pinned;
}

void StoreIndex::remove(const std::string& name) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return;
  bytes_ -= found->second.bytes;
  if (const RecordPtr& record = found->second.record; record != nullptr) {
    --num_own_;
    const auto [begin, end] = by_parent_.equal_range(record->parent);
    for (auto it = begin; it != end; ++it) {
      if (it->second == record) {
        by_parent_.erase(it);
        break;
      }
    }
  }
  entries_.erase(found);
}

std::int64_t StoreIndex::bytes_of(const Digest& root) const {
  std::int64_t bytes = 0;
  for (const auto& [name, entry] : entries_) {
    if (entry.record != nullptr && entry.record->root == root) bytes += entry.bytes;
  }
  return bytes;
}

std::vector<RecordPtr> StoreIndex::children(const Digest& parent) const {
  std::vector<RecordPtr> found;
  const auto [begin, end] = by_parent_.equal_range(parent);
  for (auto it = begin; it != end; ++it) found.push_back(it->second);
  return found;
}

std::vector<RecordPtr> StoreIndex::records(const Digest& root) const {
  std::vector<RecordPtr> found;
  for (const auto& [name, entry] : entries_) {
    if (entry.record != nullptr && entry.record->root == root) found.push_back(entry.record);
  }
  return found;
}

std::vector<std::string> StoreIndex::eviction_order(const Digest* root) const {
  constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
  struct Item {
    const std::string* name;
    const RecordInfo* record;
    std::int64_t used_at_ns;
  };
  std::vector<Item> items;
  std::unordered_map<Digest, std::size_t, HashDigest> by_key;
  for (const auto& [name, entry] : entries_) {
    items.push_back({&name, entry.record.get(), entry.pinned ? kNever : entry.used_at_ns});
  }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.used_at_ns > b.used_at_ns; });
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (items[i].record != nullptr) by_key.emplace(items[i].record->key, i);
  }
  // Latest first: who has been raised already needs nothing from later items, nor have those before it. This also
  // ends walks through records that claim to precede each other.
  for (const Item& item : items) {
    for (const RecordInfo* at = item.record; at != nullptr;) {
      const auto parent = by_key.find(at->parent);
      if (parent == by_key.end() || items[parent->second].used_at_ns >= item.used_at_ns) break;
      items[parent->second].used_at_ns = item.used_at_ns;
      at = items[parent->second].record;
    }
  }
  std::erase_if(items, [&](const Item& item) {
    return item.used_at_ns == kNever || (root != nullptr && (item.record == nullptr || item.record->root != *root));
  });
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    const auto order = [](const Item& item) {
      const std::int64_t position = item.record == nullptr ? 0 : item.record->position;
      return std::tuple<std::int64_t, std::int64_t, const std::string&>(item.used_at_ns, -position, *item.name);
    };
    return order(a) < order(b);
  });
  std::vector<std::string> names;
  for (const Item& item : items) names.push_back(*item.name);
  return names;
}

}  // namespace nb::kv
