#include "kv/kv_storage.h"

#include <cstring>

#include "base/error.h"
#include "quant/kv_format.h"

namespace nb::kv {

std::int64_t KvShape::block_bytes() const {
  return quant::kv_cell_bytes(format, head_dim) * 2 * num_kv_heads * num_layers;
}

KvStorage::KvStorage(const KvShape& shape, int num_blocks) : shape_(shape), num_blocks_(num_blocks) {
  NB_CHECK(num_blocks > 0, invalid_argument, "a KV storage needs at least one block, got ", num_blocks);
  memory_ = HostArena::create(1)->allocate(static_cast<std::size_t>(bytes()));
}

std::uint8_t* KvStorage::block(BlockId id) const {
  NB_ASSERT(id >= 0 && id < num_blocks_);
  return memory_.as<std::uint8_t>() + id * shape_.block_bytes();
}

ops::KvLayer KvStorage::layer(int index) const {
  NB_ASSERT(index >= 0 && index < shape_.num_layers);
  const std::int64_t cell_bytes = quant::kv_cell_bytes(shape_.format, shape_.head_dim);
  return {.base = memory_.as<std::uint8_t>() + index * 2 * shape_.num_kv_heads * cell_bytes,
          .block_stride = shape_.block_bytes(),
          .cell_bytes = cell_bytes,
          .num_kv_heads = shape_.num_kv_heads,
          .head_dim = shape_.head_dim,
          .format = shape_.format};
}

void KvStorage::zero(BlockId id) { std::memset(block(id), 0, static_cast<std::size_t>(shape_.block_bytes())); }

void KvStorage::copy(BlockId from, BlockId to) {
  std::memcpy(block(to), block(from), static_cast<std::size_t>(shape_.block_bytes()));
}

void KvStorage::poison([[maybe_unused]] BlockId id) {
#ifndef NDEBUG
  std::memset(block(id), 0xff, static_cast<std::size_t>(shape_.block_bytes()));
#endif
}

}  // namespace nb::kv
