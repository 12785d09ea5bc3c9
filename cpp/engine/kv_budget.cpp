#include "engine/kv_budget.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "kv/block_table.h"

namespace nb::engine {

namespace {

constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max() / kBlockTokens;

}  // namespace

kv::KvShape kv_shape_of(const model::ModelConfig& config, quant::KvFormat format) {
  return {.format = format,
          .num_layers = config.num_layers,
          .num_kv_heads = config.num_kv_heads,
          .head_dim = config.head_dim};
}

int choose_num_blocks(const KvBudget& budget) {
  NB_ASSERT(budget.block_bytes > 0 && budget.max_num_seqs > 0 && budget.max_model_len > 0);
  if (budget.kv_cache_bytes != 0) {
    NB_CHECK(budget.kv_cache_bytes >= budget.block_bytes, invalid_argument, "kv_cache_bytes is ", budget.kv_cache_bytes,
             "; one block of ", kBlockTokens, " tokens takes ", budget.block_bytes);
    return static_cast<int>(std::min(budget.kv_cache_bytes / budget.block_bytes, kMostBlocks));
  }
  const std::int64_t full_sequence = kv::BlockTable::blocks_for(budget.max_model_len);
  const std::int64_t wanted = std::min(full_sequence * budget.max_num_seqs, kMostBlocks);
  if (budget.available_bytes == 0) return static_cast<int>(wanted);
  const std::int64_t share = static_cast<std::int64_t>(budget.share * static_cast<double>(budget.available_bytes));
  const std::int64_t affordable = share / budget.block_bytes;
  NB_CHECK(affordable >= full_sequence, out_of_memory, "the KV cache of one sequence of ", budget.max_model_len,
           " tokens takes ", full_sequence * budget.block_bytes, " bytes, more than the ", share,
           " that may be used of ", budget.available_bytes,
           " bytes available; lower max_model_len or set kv_cache_bytes");
  return static_cast<int>(std::min(wanted, affordable));
}

}  // namespace nb::engine
