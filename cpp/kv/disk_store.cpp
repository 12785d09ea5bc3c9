#include "kv/disk_store.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "base/align.h"
#include "base/crc32c.h"
#include "base/error.h"
#include "tensor/allocator.h"

namespace nb::kv {
namespace {

constexpr std::size_t kKeyDigits = 2 * sizeof(Digest);

MissReason miss_of(RecordFault fault) {
  switch (fault) {
    case RecordFault::torn:
      return MissReason::torn;
    case RecordFault::version:
      return MissReason::version;
    case RecordFault::none:
    case RecordFault::checksum:
      break;
  }
  return MissReason::checksum;
}

MissReason miss_of_error(int error) { return error == EOVERFLOW ? MissReason::torn : MissReason::io; }

bool is_damage(MissReason reason) { return reason == MissReason::torn || reason == MissReason::checksum; }

/// Whether a record may stand for `tokens`: all of it, or full blocks of a chain from its beginning.
bool stands_for(const RecordInfo& info, std::span<const TokenId> tokens) {
  const std::size_t n = tokens.size();
  const bool whole = n == info.tokens.size();
  const bool leading = info.kind == RecordKind::prefix && n > 0 && n < info.tokens.size() && n % kBlockTokens == 0;
  return (whole || leading) && std::equal(tokens.begin(), tokens.end(), info.tokens.begin());
}

}  // namespace

const char* to_string(MissReason reason) {
  constexpr const char* kNames[] = {"absent", "torn", "checksum", "fingerprint", "tokens", "version", "io"};
  return reason < MissReason::count ? kNames[static_cast<std::size_t>(reason)] : "unknown";
}

const char* to_string(WriteFailure reason) {
  constexpr const char* kNames[] = {"no_space", "io", "access", "quota", "queue", "memory", "other"};
  return reason < WriteFailure::count ? kNames[static_cast<std::size_t>(reason)] : "unknown";
}

StoreMemory allocate_store_memory(std::uint64_t bytes) {
  const bool is_large = bytes >= kHugePageBytes;
  const std::uint64_t alignment = is_large ? kHugePageBytes : kStoreAlignment;
  const std::uint64_t rounded = round_up<std::uint64_t>(bytes, alignment);
  StoreMemory memory(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)));
  // Touching small pages for the first time takes longer than copying into them. Advice: refused, nothing is lost.
  if (is_large && memory != nullptr) static_cast<void>(::madvise(memory.get(), rounded, MADV_HUGEPAGE));
  return memory;
}

void FreeStoreMemory::operator()(std::byte* memory) const { std::free(memory); }

std::span<const std::byte> DiskRecord::block(std::size_t index) const {
  NB_CHECK(index < num_blocks_, invalid_argument, "block ", index, " of a record of which ", num_blocks_, " were read");
  return {memory_.get() + index * info_->block_bytes, info_->block_bytes};
}

/// A record open for reading, its head verified.
struct DiskStore::Opened {
  std::string name;
  StoreFile file;
  RecordHead head{};
  std::uint64_t head_bytes = 0;
};

DiskStore::DiskStore(const std::string& directory, const Digest& fingerprint, DiskStoreOptions options)
    : fingerprint_(fingerprint),
      own_suffix_(record_file_name(Digest{}, fingerprint).substr(kKeyDigits)),
      options_(std::move(options)),
      directory_(directory, options_.calls) {
  NB_CHECK(options_.quota_bytes > 0 && options_.namespace_quota_bytes >= 0 && options_.queue_bytes > 0,
           invalid_argument, "a disk store with a quota of ", options_.quota_bytes, " bytes, ",
           options_.namespace_quota_bytes, " per namespace and a queue of ", options_.queue_bytes);
  stats_.temporaries_removed = directory_.remove_abandoned();
  rescan(true);
  evict(nullptr, 0, options_.quota_bytes);
  writer_ = std::thread([this] { run_writer(); });
}

DiskStore::~DiskStore() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  writer_.join();
}

// ---- what is there ----

/// Brings the index up to date with the directory, if that has changed since or `even_if_unchanged`: a use changes only
/// the file.
void DiskStore::rescan(bool even_if_unchanged) {
  const std::int64_t modified = directory_.modified_ns();
  {
    const std::lock_guard lock(mutex_);
    if (!even_if_unchanged && modified >= 0 && modified == listed_at_ns_) return;
  }
  std::vector<ListedFile> files = directory_.list(is_record_file_name);
  const auto by_name = [](const ListedFile& a, const ListedFile& b) { return a.name < b.name; };
  std::sort(files.begin(), files.end(), by_name);
  std::vector<const ListedFile*> unknown;
  {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> vanished;
    for (const auto& [name, entry] : index_.entries()) {
      const auto file = std::lower_bound(files.begin(), files.end(), ListedFile{.name = name}, by_name);
      if (file == files.end() || file->name != name) vanished.push_back(name);
    }
    for (const std::string& name : vanished) index_.remove(name);
    for (const ListedFile& file : files) {
      const StoreEntry* entry = index_.find(file.name);
      if (entry == nullptr || entry->bytes != file.bytes) {
        unknown.push_back(&file);
      } else {
        index_.set_used(file.name, file.modified_ns, file.pinned);
      }
    }
  }
  for (const ListedFile* file : unknown) learn(*file);
  const std::lock_guard lock(mutex_);
  listed_at_ns_ = modified;
}

/// Reads the head of a file and takes it into the index; removes it if it is damaged.
void DiskStore::learn(const ListedFile& listed) {
  StoreEntry entry{.record = nullptr, .bytes = listed.bytes, .used_at_ns = listed.modified_ns, .pinned = listed.pinned};
  if (is_own(listed.name)) {
    int error = 0;
    std::optional<StoreFile> file = directory_.open(listed.name, &error);
    if (!file && error == ENOENT) return;
    if (file) {
      Opened opened{.name = listed.name, .file = std::move(*file)};
      const std::optional<MissReason> fault = read_head(opened);
      if (fault && is_damage(*fault)) return remove_damaged(listed.name);
      if (!fault) entry.record = std::make_shared<const RecordInfo>(std::move(opened.head.info));
    }
  }
  const std::lock_guard lock(mutex_);
  index_.set(listed.name, std::move(entry));
}

/// Reads and verifies the head of an open file.
std::optional<MissReason> DiskStore::read_head(Opened& opened) const {
  const auto file_bytes = static_cast<std::uint64_t>(opened.file.facts().bytes);
  std::vector<std::byte> head(std::min<std::uint64_t>(file_bytes, kStoreAlignment));
  if (const int error = opened.file.read(0, head); error != 0) return miss_of_error(error);
  RecordFault fault = measure_record_head(head, file_bytes, &opened.head_bytes);
  if (fault != RecordFault::none) return miss_of(fault);
  if (const std::size_t got = head.size(); got < opened.head_bytes) {
    head.resize(opened.head_bytes);
    if (const int error = opened.file.read(got, std::span(head).subspan(got)); error != 0) return miss_of_error(error);
  }
  fault = parse_record_head(head, file_bytes, &opened.head);
  if (fault != RecordFault::none) return miss_of(fault);
  if (opened.head.fingerprint != fingerprint_) return MissReason::fingerprint;
  // A file under the name of another key would be found again and again and never serve.
  if (name_of(opened.head.info.key) != opened.name) return MissReason::checksum;
  return std::nullopt;
}

RecordPtr DiskStore::find(const Digest& key) {
  const std::string name = name_of(key);
  {
    const std::lock_guard lock(mutex_);
    if (const StoreEntry* entry = index_.find(name); entry != nullptr) return entry->record;
  }
  int error = 0;
  const std::optional<StoreFile> file = directory_.open(name, &error);
  if (!file) return nullptr;
  learn(file->facts());
  const std::lock_guard lock(mutex_);
  const StoreEntry* entry = index_.find(name);
  return entry == nullptr ? nullptr : entry->record;
}

std::vector<RecordPtr> DiskStore::children(const Digest& parent) {
  rescan(false);
  const std::lock_guard lock(mutex_);
  return index_.children(parent);
}

std::optional<DiskStore::Match> DiskStore::match(const Digest& parent, std::span<const TokenId> tokens) {
  rescan(false);
  return match_known(parent, tokens);
}

std::optional<DiskStore::Match> DiskStore::match_known(const Digest& parent, std::span<const TokenId> tokens) const {
  std::vector<RecordPtr> followers;
  {
    const std::lock_guard lock(mutex_);
    followers = index_.children(parent);
  }
  std::optional<Match> best;
  for (RecordPtr& record : followers) {
    if (record->kind != RecordKind::prefix) continue;
    const std::vector<TokenId>& own = record->tokens;
    const auto differ = std::mismatch(own.begin(), own.end(), tokens.begin(), tokens.end()).first;
    const auto same = static_cast<std::size_t>(differ - own.begin()) / kBlockTokens * kBlockTokens;
    if (same > (best ? best->num_tokens : 0)) best = Match{.record = std::move(record), .num_tokens = same};
  }
  return best;
}

std::vector<RecordPtr> DiskStore::records(const Digest& root) {
  rescan(false);
  const std::lock_guard lock(mutex_);
  return index_.records(root);
}

// ---- reading ----

std::optional<DiskRecord> DiskStore::open(const Digest& key, std::span<const TokenId> tokens,
                                          const std::atomic<bool>* stop) {
  std::optional<Opened> opened = open_verified(key, tokens);
  if (!opened) return std::nullopt;
  DiskRecord record;
  const std::uint64_t block_bytes = opened->head.info.block_bytes;
  record.num_blocks_ = ceil_div<std::size_t>(tokens.size(), kBlockTokens);
  record.memory_ = allocate_store_memory(record.num_blocks_ * block_bytes);
  if (record.memory_ == nullptr) {
    miss(MissReason::io, opened->name);
    return std::nullopt;
  }
  std::vector<std::span<std::byte>> blocks;
  for (std::size_t i = 0; i < record.num_blocks_; ++i) {
    blocks.emplace_back(record.memory_.get() + i * block_bytes, block_bytes);
  }
  if (!read_blocks(*opened, blocks, stop)) return std::nullopt;
  record.info_ = std::make_shared<const RecordInfo>(std::move(opened->head.info));
  return record;
}

bool DiskStore::load(const Digest& key, std::span<const TokenId> tokens, std::span<const std::span<std::byte>> blocks,
                     const std::atomic<bool>* stop) {
  NB_CHECK(blocks.size() == ceil_div<std::size_t>(tokens.size(), kBlockTokens), invalid_argument, blocks.size(),
           " blocks for ", tokens.size(), " tokens of a record");
  std::optional<Opened> opened = open_verified(key, tokens);
  if (!opened) return false;
  const std::uint64_t block_bytes = opened->head.info.block_bytes;
  const auto fits = [&](std::span<std::byte> block) { return block.size() == block_bytes; };
  if (!std::all_of(blocks.begin(), blocks.end(), fits)) {
    miss(MissReason::fingerprint, opened->name);  // blocks of another shape are another format, whatever it says
    return false;
  }
  return read_blocks(*opened, blocks, stop);
}

/// Opens the record and verifies everything but its blocks; counts a miss otherwise.
std::optional<DiskStore::Opened> DiskStore::open_verified(const Digest& key, std::span<const TokenId> tokens) {
  std::string name = name_of(key);
  int error = 0;
  std::optional<StoreFile> file = directory_.open(name, &error);
  if (!file) {
    miss(error == ENOENT ? why_absent(key) : MissReason::io, name);
    return std::nullopt;
  }
  std::optional<Opened> opened(Opened{.name = std::move(name), .file = std::move(*file)});
  std::optional<MissReason> wrong = read_head(*opened);
  if (!wrong && !stands_for(opened->head.info, tokens)) wrong = MissReason::tokens;
  if (!wrong) return opened;
  miss(*wrong, opened->name);
  return std::nullopt;
}

/// Reads the leading blocks of the record and compares their checksums; counts a hit or a miss.
bool DiskStore::read_blocks(Opened& opened, std::span<const std::span<std::byte>> blocks,
                            const std::atomic<bool>* stop) {
  std::uint64_t offset = opened.head_bytes;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (stop != nullptr && *stop) return false;
    const int error = opened.file.read(offset, blocks[i]);
    const bool same = error == 0 && crc32c(blocks[i]) == opened.head.checksums[i];
    if (!same) {
      miss(error != 0 ? miss_of_error(error) : MissReason::checksum, opened.name);
      return false;
    }
    offset += blocks[i].size();
  }
  opened.file.touch();
  bool known = true;
  {
    const std::lock_guard lock(mutex_);
    ++stats_.hits;
    stats_.bytes_read += static_cast<std::int64_t>(offset - opened.head_bytes);
    known = index_.find(opened.name) != nullptr;
  }
  if (!known) learn(opened.file.facts());
  return true;
}

void DiskStore::prefetch(const Digest& key) {
  int error = 0;
  if (const std::optional<StoreFile> file = directory_.open(name_of(key), &error)) file->prefetch();
}

/// Whether the key is there under another fingerprint or version.
MissReason DiskStore::why_absent(const Digest& key) const {
  const std::string digits = to_hex(key);
  const std::string own = name_of(key);
  MissReason reason = MissReason::absent;
  const std::lock_guard lock(mutex_);
  const auto& entries = index_.entries();
  for (auto it = entries.lower_bound(digits); it != entries.end() && it->first.starts_with(digits); ++it) {
    if (it->first == own) continue;
    const std::size_t stem = own.rfind('.');
    reason = it->first.compare(0, stem, own, 0, stem) == 0 ? MissReason::version : MissReason::fingerprint;
  }
  return reason;
}

void DiskStore::miss(MissReason reason, const std::string& name) {
  if (is_damage(reason)) remove_damaged(name);
  const std::lock_guard lock(mutex_);
  ++stats_.misses[static_cast<std::size_t>(reason)];
  if (reason == MissReason::absent) index_.remove(name);
}

void DiskStore::remove_damaged(const std::string& name) {
  const bool removed = directory_.remove(name);
  const std::lock_guard lock(mutex_);
  index_.remove(name);
  if (removed) ++stats_.damaged_removed;
}

DiskStoreStats DiskStore::stats() const {
  const std::lock_guard lock(mutex_);
  DiskStoreStats stats = stats_;
  stats.records = index_.num_own();
  stats.foreign_records = static_cast<std::int64_t>(index_.entries().size()) - stats.records;
  stats.bytes = index_.bytes();
  stats.waiting_bytes = queued_bytes_;
  return stats;
}

}  // namespace nb::kv
