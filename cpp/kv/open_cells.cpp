#include "kv/open_cells.h"

#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "tensor/device_memory.h"

namespace nb::kv {

std::int64_t OpenCells::bytes_for(const KvShape& shape, int num_cells) {
  return std::int64_t{num_cells} * shape.num_layers * shape.num_kv_heads * shape.head_dim * kBlockTokens * 4;
}

OpenCells::OpenCells(const KvShape& shape, int num_cells, const DeviceMemory* device)
    : num_cells_(num_cells),
      layer_floats_(std::int64_t{shape.num_kv_heads} * shape.head_dim * kBlockTokens),
      cell_floats_(layer_floats_ * shape.num_layers) {
  NB_CHECK(num_cells > 0, invalid_argument, "open cells: there must be one at least, got ", num_cells);
  const auto size = static_cast<std::size_t>(bytes());
  memory_ = device == nullptr ? HostArena::create(1)->allocate(size) : allocate_on(*device, size);
}

ops::OpenKeys OpenCells::layer(int index) const {
  NB_ASSERT(index >= 0 && index * layer_floats_ < cell_floats_);
  ops::OpenKeys keys;
  keys.cells = memory_.as<float>() + index * layer_floats_;
  keys.cell_stride = cell_floats_;
  return keys;
}

}  // namespace nb::kv
