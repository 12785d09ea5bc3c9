#include "kv/kv_storage.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "quant/kv_format.h"
#include "tensor/device_memory.h"

namespace nb::kv {

std::int64_t KvShape::key_cell_bytes() const { return quant::kv_format_info(format).key_cell_bytes(head_dim); }

std::int64_t KvShape::value_cell_bytes() const { return quant::kv_format_info(format).value_cell_bytes(head_dim); }

std::int64_t KvShape::block_bytes() const {
  return (key_cell_bytes() + value_cell_bytes()) * num_kv_heads * num_layers;
}

KvStorage::KvStorage(const KvShape& shape, int num_blocks, const DeviceMemory* device, int num_open_cells)
    : shape_(shape), num_blocks_(num_blocks), device_(device) {
  NB_CHECK(num_blocks > 0, invalid_argument, "a KV storage needs at least one block, got ", num_blocks);
  const auto size = static_cast<std::size_t>(bytes());
  memory_ = device == nullptr ? HostArena::create(1)->allocate(size) : allocate_on(*device, size);
  NB_CHECK(num_open_cells == 0 || quant::seals_keys(shape.format), unsupported, "KV format ",
           quant::to_string(shape.format), " has no open cells");
  if (num_open_cells > 0) open_cells_.emplace(shape, num_open_cells, device);
}

std::uint8_t* KvStorage::block(BlockId id) const {
  NB_ASSERT(id >= 0 && id < num_blocks_);
  return memory_.as<std::uint8_t>() + id * shape_.block_bytes();
}

ops::KvLayer KvStorage::layer(int index) const {
  NB_ASSERT(index >= 0 && index < shape_.num_layers);
  const std::int64_t head_bytes = shape_.key_cell_bytes() + shape_.value_cell_bytes();
  return {.base = memory_.as<std::uint8_t>() + index * shape_.num_kv_heads * head_bytes,
          .block_stride = shape_.block_bytes(),
          .key_cell_bytes = shape_.key_cell_bytes(),
          .value_cell_bytes = shape_.value_cell_bytes(),
          .num_kv_heads = shape_.num_kv_heads,
          .head_dim = shape_.head_dim,
          .format = shape_.format};
}

std::uint8_t* KvStorage::used_block(BlockId id) {
  used_bytes_ = std::max(used_bytes_, (id + 1) * shape_.block_bytes());
  return block(id);
}

void KvStorage::fill(std::uint8_t* block, int value) {
  const auto size = static_cast<std::size_t>(shape_.block_bytes());
  if (device_ != nullptr) {
    device_->fill(block, static_cast<unsigned char>(value), size);
  } else {
    std::memset(block, value, size);
  }
}

void KvStorage::zero(BlockId id) { fill(used_block(id), 0); }

void KvStorage::copy(BlockId from, BlockId to) {
  const auto size = static_cast<std::size_t>(shape_.block_bytes());
  if (device_ != nullptr) {
    device_->copy_within(used_block(to), block(from), size);
  } else {
    std::memcpy(used_block(to), block(from), size);
  }
}

void KvStorage::read(BlockId id, std::span<std::byte> out) const {
  NB_ASSERT(static_cast<std::int64_t>(out.size()) == shape_.block_bytes());
  if (device_ != nullptr) {
    device_->copy_out(out.data(), block(id), out.size());
    check(*device_);
  } else {
    std::memcpy(out.data(), block(id), out.size());
  }
}

void KvStorage::write(BlockId id, std::span<const std::byte> from) {
  NB_ASSERT(static_cast<std::int64_t>(from.size()) == shape_.block_bytes());
  if (device_ != nullptr) {
    device_->copy_in(used_block(id), from.data(), from.size());
    check(*device_);
  } else {
    std::memcpy(used_block(id), from.data(), from.size());
  }
}

std::span<std::byte> KvStorage::host_memory(BlockId id) {
  if (device_ != nullptr) return {};
  return {reinterpret_cast<std::byte*>(used_block(id)), static_cast<std::size_t>(shape_.block_bytes())};
}

bool KvStorage::touch_ahead(std::int64_t ahead_bytes) {
  if (device_ != nullptr) return false;
  touched_bytes_ = std::max(touched_bytes_, used_bytes_);
  const std::int64_t wanted = std::min(used_bytes_ + ahead_bytes, bytes());
  if (touched_bytes_ >= wanted) return false;
  const std::int64_t end = std::min(touched_bytes_ + static_cast<std::int64_t>(kHugePageBytes), wanted);
  volatile std::uint8_t* const base = memory_.as<std::uint8_t>();
  for (std::int64_t i = touched_bytes_; i < end; i += 4096) base[i] = 0;  // nobody's yet: zero already
  base[end - 1] = 0;
  touched_bytes_ = end;
  return true;
}

void KvStorage::poison([[maybe_unused]] BlockId id) {
#ifndef NDEBUG
  fill(block(id), 0xff);
#endif
}

}  // namespace nb::kv
