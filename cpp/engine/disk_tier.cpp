#include "engine/disk_tier.h"

#include <algorithm>
#include <exception>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/hash_field.h"
#include "base/log.h"
#include "quant/kv_format.h"

namespace nb::engine {

namespace {

using SteadyClock = std::chrono::steady_clock;

/// Records of other processes that do not end where ours would are looked for so often.
constexpr std::chrono::seconds kListEvery{1};

constexpr std::size_t kRecordBlocks = kv::kMaxPrefixTokens / kBlockTokens;

class Fields {
 public:
  void add(std::string_view name, std::string_view value) { add_field(hash_, name, value); }
  /// The bytes of a number.
  template <class Number>
  void add_number(std::string_view name, Number value) {
    static_assert(std::is_arithmetic_v<Number>);
    add(name, {reinterpret_cast<const char*>(&value), sizeof(value)});
  }
  Digest finish() { return hash_.finish(); }

 private:
  Sha256 hash_;
};

void add_rope(Fields& fields, const model::RopeFacts& rope) {
  fields.add_number("rope theta", rope.theta);
  fields.add("rope scaling", to_string(rope.scaling));
  fields.add_number("rope factor", rope.factor);
  fields.add_number("rope original context", rope.original_context);
  fields.add_number("rope low frequency factor", rope.low_freq_factor);
  fields.add_number("rope high frequency factor", rope.high_freq_factor);
  fields.add_number("rope beta fast", rope.beta_fast);
  fields.add_number("rope beta slow", rope.beta_slow);
  fields.add_number("rope truncate", static_cast<int>(rope.truncate));
  fields.add_number("rope has magnitude", static_cast<int>(rope.magnitude.has_value()));
  fields.add_number("rope magnitude", rope.magnitude.value_or(0.0));
  const std::span<const float> divisors(rope.divisors);
  fields.add("rope divisors", {reinterpret_cast<const char*>(divisors.data()), divisors.size_bytes()});
}

/// Runs `what`; what it throws is told once in a while and is `otherwise`.
template <class Function, class Result>
Result guarded(const char* doing, Result otherwise, const Function& what) noexcept {
  try {
    return what();
  } catch (const std::exception& error) {
    log(LogLevel::warning, "the KV store: ", doing, " failed: ", error.what());
  }
  return otherwise;
}

}  // namespace

Digest kv_fingerprint(const model::Model& model, quant::KvFormat format, const Digest& content) {
  const model::ModelConfig& config = model.config();
  Fields fields;
  fields.add("content", {reinterpret_cast<const char*>(content.data()), content.size()});
  fields.add_number("numerics", kKvNumericsVersion);
  fields.add("kernels", model.kernels().name);
  fields.add("hardware", model.backend().hardware);
  fields.add_number("deterministic", static_cast<int>(model.deterministic()));
  for (const ops::FusedOp op : ops::kFusedOps) {
    fields.add_number(ops::to_string(op), static_cast<int>(model.fusion().fused[op]));
  }
  fields.add_number("activations", static_cast<int>(model.act_type()));
  fields.add("kv format", quant::to_string(format));
  fields.add("kv layout", quant::kv_format_info(format).layout);
  fields.add_number("block tokens", static_cast<int>(kBlockTokens));
  fields.add("architecture", config.architecture);
  fields.add_number("layers", config.num_layers);
  fields.add_number("heads", config.num_heads);
  fields.add_number("kv heads", config.num_kv_heads);
  fields.add_number("head dim", config.head_dim);
  fields.add_number("hidden size", config.hidden_size);
  fields.add_number("vocabulary", config.vocab_size);
  fields.add_number("norm eps", config.rms_norm_eps);
  fields.add_number("sliding window", config.sliding_window);
  fields.add_number("qkv bias", static_cast<int>(config.qkv_bias));
  fields.add_number("qk norm", static_cast<int>(config.qk_norm));
  add_rope(fields, config.rope);
  return fields.finish();
}

DiskTier::DiskTier(const std::string& directory, std::int64_t quota_bytes, const Digest& fingerprint, Parts parts)
    : store_(directory, fingerprint, {.quota_bytes = quota_bytes}),
      parts_(std::move(parts)),
      listed_(SteadyClock::now()),
      queue_(store_, parts_.num_readers, parts_.wake) {
  const kv::DiskStoreStats stats = store_.stats();
  log(LogLevel::info, "KV store ", directory, ": ", stats.records, " records of this model, ", stats.foreign_records,
      " others, ", stats.bytes, " bytes");
}

// ---- loading ----

LoadId DiskTier::begin_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens,
                              std::span<const BlockId> blocks, int first) noexcept {
  return guarded("loading a prefix", LoadId{0}, [&] {
    const auto from = static_cast<std::size_t>(first);
    return begin(find_pieces(keys, tokens, blocks.size(), from), tokens, blocks, from);
  });
}

LoadId DiskTier::begin_chunk(const Digest& key, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                             int first) noexcept {
  return guarded("loading a chunk", LoadId{0}, [&] {
    std::vector<Piece> pieces;
    if (store_.find(key) != nullptr) pieces.push_back({.key = key, .first_block = 0, .num_blocks = blocks.size()});
    return begin(std::move(pieces), tokens, blocks, static_cast<std::size_t>(first));
  });
}

std::optional<int> DiskTier::take(LoadId load) noexcept {
  copy_to_device();
  const std::optional<std::size_t> num_read = queue_.take(load);
  if (!num_read) return std::nullopt;
  const auto node = begun_.extract(load);
  const Begun& begun = node.mapped();
  load_seconds_ = load_seconds_ + std::chrono::duration<double>(SteadyClock::now() - begun.since).count();
  const std::size_t num_good = std::min(*num_read, begun.num_good);
  if (num_good == 0) return 0;
  const Piece& last = begun.pieces[num_good - 1];
  return static_cast<int>(last.first_block + last.num_blocks - begun.first);
}

void DiskTier::stop(LoadId load) noexcept {
  queue_.stop(load);
  begun_.erase(load);
}

/// Whether it is time to look for what other processes wrote.
bool DiskTier::may_list() {
  const auto now = SteadyClock::now();
  if (now - listed_ < kListEvery) return false;
  listed_ = now;
  return true;
}

/// The records that give blocks [first, num_blocks), as far as there are any without a gap. Whole records are found by
/// their keys; the last one may go on with other tokens than these.
std::vector<DiskTier::Piece> DiskTier::find_pieces(const kv::PrefixKeys& keys, std::span<const TokenId> tokens,
                                                   std::size_t num_blocks, std::size_t first) {
  std::vector<Piece> pieces;
  for (std::size_t at = first / kRecordBlocks * kRecordBlocks; at < num_blocks; at += kRecordBlocks) {
    const std::size_t wanted = std::min(kRecordBlocks, num_blocks - at);
    const Digest& last = keys.keys[at + wanted - 1];
    Piece piece{.key = last, .first_block = at, .num_blocks = wanted};
    if (store_.find(last) == nullptr) {
      const Digest& parent = at == 0 ? keys.root : keys.keys[at - 1];
      const auto own = tokens.subspan(at * kBlockTokens, wanted * kBlockTokens);
      std::optional<kv::DiskStore::Match> found = store_.match_known(parent, own);
      if ((!found || found->num_tokens < own.size()) && may_list()) found = store_.match(parent, own);
      if (!found) break;
      piece.key = found->record->key;
      piece.num_blocks = found->num_tokens / kBlockTokens;
    }
    if (at + piece.num_blocks > first) pieces.push_back(piece);
    if (piece.num_blocks < kRecordBlocks) break;
  }
  return pieces;
}

/// Begins to fill the blocks of all pieces but those before `first`, which have their content.
LoadId DiskTier::begin(std::vector<Piece> pieces, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                       std::size_t first) {
  if (pieces.empty()) {
    ++num_absent_;
    return 0;
  }
  parts_.settle();
  for (const Piece& piece : std::span(pieces).subspan(1)) store_.prefetch(piece.key);
  const auto block_bytes = static_cast<std::size_t>(parts_.storage.shape().block_bytes());
  const bool is_host = !parts_.storage.host_memory(blocks[0]).empty();
  const std::size_t begin = pieces.front().first_block;
  const std::size_t num_known = first - std::min(first, begin);
  kv::StoreMemory known;
  if (is_host && num_known > 0) {
    known = kv::allocate_store_memory(num_known * block_bytes);
    if (known == nullptr) return 0;
  }
  std::vector<LoadPart> parts;
  for (const Piece& piece : pieces) {
    const std::span<const TokenId> own = tokens_of(piece, tokens);
    LoadPart& part = parts.emplace_back(LoadPart{.key = piece.key, .tokens = {own.begin(), own.end()}, .memory = {}});
    if (!is_host) part.own_bytes = piece.num_blocks * block_bytes;
    for (std::size_t i = piece.first_block; is_host && i < piece.first_block + piece.num_blocks; ++i) {
      part.memory.push_back(i < first ? std::span(known.get() + (i - begin) * block_bytes, block_bytes)
                                      : parts_.storage.host_memory(blocks[i]));
    }
  }
  // Nothing may fail once it has begun.
  begun_.insert_or_assign(0, Begun{.pieces = std::move(pieces),
                                   .blocks = {blocks.begin(), blocks.end()},
                                   .first = first,
                                   .num_good = parts.size(),
                                   .since = SteadyClock::now()});
  auto node = begun_.extract(0);
  node.key() = queue_.add(std::move(parts), std::move(known));
  return begun_.insert(std::move(node)).position->first;
}

/// Copies what was read for a device.
void DiskTier::copy_to_device() noexcept {
  const auto block_bytes = static_cast<std::uint64_t>(parts_.storage.shape().block_bytes());
  for (const ReadPart& part : queue_.collect()) {
    Begun& begun = begun_.at(part.load);
    const Piece& piece = begun.pieces[part.index];
    const bool is_copied = guarded("copying to the device", false, [&] {
      if (part.record.info().block_bytes != block_bytes) return false;
      for (std::size_t i = std::max(piece.first_block, begun.first); i < piece.first_block + piece.num_blocks; ++i) {
        parts_.storage.write(begun.blocks[i], part.record.block(i - piece.first_block));
      }
      return true;
    });
    if (!is_copied) begun.num_good = std::min(begun.num_good, part.index);
  }
}

std::span<const TokenId> DiskTier::tokens_of(const Piece& piece, std::span<const TokenId> tokens) {
  const std::size_t begin = piece.first_block * kBlockTokens;
  return tokens.subspan(begin, std::min(piece.num_blocks * kBlockTokens, tokens.size() - begin));
}

// ---- saving ----

bool DiskTier::has(const SaveRecord& record) const noexcept {
  return guarded("looking for a record", false, [&] {
    if (store_.knows(record.key)) return true;
    if (record.kind == kv::RecordKind::chunk) return false;
    const std::optional<kv::DiskStore::Match> longer = store_.match_known(record.parent, record.tokens);
    return longer && longer->num_tokens == record.tokens.size();
  });
}

void DiskTier::save(const SaveRecord& record) noexcept {
  guarded("saving", false, [&] {
    const kv::RecordInfo info{.kind = record.kind,
                              .root = record.root,
                              .parent = record.parent,
                              .key = record.key,
                              .position = static_cast<std::uint32_t>(record.position),
                              .tokens = {record.tokens.begin(), record.tokens.end()},
                              .block_bytes = static_cast<std::uint64_t>(parts_.storage.shape().block_bytes())};
    store_.put(info,
               [&](std::size_t block, std::span<std::byte> out) { parts_.storage.read(record.blocks[block], out); });
    return true;
  });
}

void DiskTier::finish(std::chrono::duration<double> time) {
  if (store_.flush_within(time)) return;
  log(LogLevel::warning, "the KV store ", store_.path(), " is too slow: what waits to be written is given up");
  store_.drop_waiting();
}

void DiskTier::erase_chunk(const Digest& key) noexcept {
  guarded("removing a chunk", false, [&] { return store_.erase(key); });
}

DiskTierStats DiskTier::stats() const {
  DiskTierStats stats{.store = store_.stats(), .load_seconds = load_seconds_};
  stats.store.misses[static_cast<std::size_t>(kv::MissReason::absent)] += num_absent_;
  return stats;
}

}  // namespace nb::engine
