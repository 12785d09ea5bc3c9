// The memory behind a block pool for one model: one arena, one contiguous piece per block over all layers.
//
// Not for who owns which block (block_pool.h). One thread writes it: the one that runs steps.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "base/ids.h"
#include "kv/open_cells.h"
#include "ops/args.h"
#include "tensor/allocator.h"

namespace nb::kv {

/// What decides the size of a block.
struct KvShape {
  quant::KvFormat format;
  int num_layers;
  int num_kv_heads;
  int head_dim;

  /// Bytes of the keys and of the values of 16 tokens of one head in one layer.
  std::int64_t key_cell_bytes() const;
  std::int64_t value_cell_bytes() const;

  /// Bytes of one block of 16 tokens over all layers.
  std::int64_t block_bytes() const;
};

class KvStorage {
 public:
  /// Reserves address space for `num_blocks` blocks; pages become resident when first written. With a device: allocates
  /// them there. `num_open_cells`: see OpenCells; of formats that seal. Throws out_of_memory.
  KvStorage(const KvShape& shape, int num_blocks, const DeviceMemory* device = nullptr, int num_open_cells = 0);

  const KvShape& shape() const { return shape_; }
  int num_blocks() const { return num_blocks_; }
  std::int64_t bytes() const { return shape_.block_bytes() * num_blocks_; }

  /// The cells of one layer, as kernels see them.
  ops::KvLayer layer(int index) const;

  /// The open cells of one layer; none if there are none.
  ops::OpenKeys open_layer(int index) const { return open_cells_ ? open_cells_->layer(index) : ops::OpenKeys{}; }

  /// Clears a block before its first use: masked positions must add exact zeros, so nothing may be NaN.
  void zero(BlockId block);

  /// Copies all of a block over another one.
  void copy(BlockId from, BlockId to);

  /// Copies all of a block to host memory of block_bytes() bytes. Throws what the device says.
  void read(BlockId block, std::span<std::byte> out) const;

  /// Fills all of a block from host memory of block_bytes() bytes. Throws what the device says.
  void write(BlockId block, std::span<const std::byte> from);

  /// The block's memory, to be written as a whole; empty if it is on a device.
  std::span<std::byte> host_memory(BlockId block);

  /// Has the system provide up to 2 MB behind the blocks used so far, which takes it milliseconds that a step would
  /// wait for. Returns false, and does nothing, when `ahead_bytes` are there. Unused blocks are used in ascending
  /// order.
  bool touch_ahead(std::int64_t ahead_bytes);

  /// Fills a freed block with NaN in Debug builds, so that a read after free is seen.
  void poison(BlockId block);

 private:
  std::uint8_t* block(BlockId id) const;
  std::uint8_t* used_block(BlockId id);
  void fill(std::uint8_t* block, int value);

  KvShape shape_;
  int num_blocks_;
  const DeviceMemory* device_;  // null: the host
  Buffer memory_;
  std::optional<OpenCells> open_cells_;
  std::int64_t used_bytes_ = 0;     // up to the end of the last block ever used
  std::int64_t touched_bytes_ = 0;  // what the system has provided, at least
};

}  // namespace nb::kv
