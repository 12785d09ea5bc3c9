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
  fields.add("kv layout", "[block][layer][K|V][head][token][dim]");
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
      listed_(SteadyClock::now()) {
  const kv::DiskStoreStats stats = store_.stats();
  log(LogLevel::info, "KV store ", directory, ": ", stats.records, " records of this model, ", stats.foreign_records,
      " others, ", stats.bytes, " bytes");
}

// ---- loading ----

int DiskTier::load_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                          int first) noexcept {
  const auto begun = SteadyClock::now();
  const int loaded = guarded("loading a prefix", 0, [&] {
    const auto from = static_cast<std::size_t>(first);
    const std::vector<Piece> pieces = find_pieces(keys, tokens, blocks.size(), from);
    if (pieces.empty()) {
      ++num_absent_;
      return 0;
    }
    return static_cast<int>(load_all(pieces, tokens, blocks, from) - from);
  });
  load_seconds_ = load_seconds_ + std::chrono::duration<double>(SteadyClock::now() - begun).count();
  return loaded;
}

bool DiskTier::load_chunk(const Digest& key, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                          int first) noexcept {
  const auto begun = SteadyClock::now();
  const bool loaded = guarded("loading a chunk", false, [&] {
    if (store_.find(key) == nullptr) {
      ++num_absent_;
      return false;
    }
    const Piece piece{.key = key, .first_block = 0, .num_blocks = blocks.size()};
    const auto from = static_cast<std::size_t>(first);
    return load_all(std::span(&piece, 1), tokens, blocks, from) == blocks.size();
  });
  load_seconds_ = load_seconds_ + std::chrono::duration<double>(SteadyClock::now() - begun).count();
  return loaded;
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

/// Fills the blocks of all pieces but those before `first`, which have their content; returns the block behind the last
/// that was filled without a gap.
std::size_t DiskTier::load_all(std::span<const Piece> pieces, std::span<const TokenId> tokens,
                               std::span<const BlockId> blocks, std::size_t first) {
  parts_.settle();
  for (const Piece& piece : pieces.subspan(1)) store_.prefetch(piece.key);
  std::vector<std::uint8_t> loaded(pieces.size(), 0);
  if (parts_.storage.host_memory(blocks[0]).empty()) {
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      if (!load_to_device(pieces[i], tokens, blocks, first)) break;
      loaded[i] = 1;
    }
  } else {
    const std::size_t block_bytes = parts_.storage.host_memory(blocks[0]).size();
    const std::size_t begin = pieces.front().first_block;
    const std::size_t num_known = first - std::min(first, begin);
    const kv::StoreMemory known = kv::allocate_store_memory(std::max<std::size_t>(num_known, 1) * block_bytes);
    if (known == nullptr) return first;
    std::vector<std::span<std::byte>> memory(blocks.size());
    for (std::size_t i = begin; i < blocks.size(); ++i) {
      memory[i] = i < first ? std::span(known.get() + (i - begin) * block_bytes, block_bytes)
                            : parts_.storage.host_memory(blocks[i]);
    }
    // Reading is copying and summing up: one processor is slower at it than the memory.
    parts_.pool.run([&](const Part& part) {
      for (auto i = static_cast<std::size_t>(part.index); i < pieces.size();
           i += static_cast<std::size_t>(part.count)) {
        loaded[i] = guarded("loading a record", std::uint8_t{0}, [&] {
          const auto into = std::span(memory).subspan(pieces[i].first_block, pieces[i].num_blocks);
          return static_cast<std::uint8_t>(store_.load(pieces[i].key, tokens_of(pieces[i], tokens), into));
        });
      }
    });
  }
  std::size_t end = first;
  for (std::size_t i = 0; i < pieces.size() && loaded[i] != 0; ++i) end = pieces[i].first_block + pieces[i].num_blocks;
  return end;
}

bool DiskTier::load_to_device(const Piece& piece, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                              std::size_t first) {
  const std::optional<kv::DiskRecord> record = store_.open(piece.key, tokens_of(piece, tokens));
  const auto block_bytes = static_cast<std::uint64_t>(parts_.storage.shape().block_bytes());
  if (!record || record->info().block_bytes != block_bytes) return false;
  for (std::size_t i = std::max(piece.first_block, first); i < piece.first_block + piece.num_blocks; ++i) {
    parts_.storage.write(blocks[i], record->block(i - piece.first_block));
  }
  return true;
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
