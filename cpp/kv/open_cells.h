// The memory of keys that no block has yet: of formats that quantize the keys of a block when it is full.
//
// A cell has the keys of up to 16 tokens over all layers, un-rotated, in f32, where the blocks are. Not for who has
// which cell (engine/open_groups.h). One thread uses it: the one that runs steps.
#pragma once

#include <cstdint>

#include "ops/args.h"
#include "tensor/allocator.h"

namespace nb::kv {

struct KvShape;

class OpenCells {
 public:
  /// Reserves address space for `num_cells` cells; pages become resident when first written. With a device: allocates
  /// them there. Throws out_of_memory.
  OpenCells(const KvShape& shape, int num_cells, const DeviceMemory* device = nullptr);

  /// The cells of one layer, as kernels see them; rows are the caller's.
  ops::OpenKeys layer(int index) const;

  /// What so many cells take.
  static std::int64_t bytes_for(const KvShape& shape, int num_cells);
  std::int64_t bytes() const { return num_cells_ * cell_floats_ * 4; }

 private:
  int num_cells_;
  std::int64_t layer_floats_;  // of a cell in one layer
  std::int64_t cell_floats_;   // in all
  Buffer memory_;
};

}  // namespace nb::kv
