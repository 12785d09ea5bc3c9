#include "kv/open_cells.h"

#include <gtest/gtest.h>

#include <set>

#include "base/error.h"
#include "kv/kv_storage.h"

namespace nb::kv {
namespace {

// Layers and heads of cells tile the memory without overlap, and what is written stays.
TEST(OpenCells, CellsOfLayersDoNotOverlap) {
  const KvShape shape{quant::KvFormat::int4, 3, 2, 16};
  const OpenCells cells(shape, 4);
  EXPECT_EQ(cells.bytes(), 4 * 3 * 2 * 16 * 16 * 4);
  EXPECT_EQ(OpenCells::bytes_for(shape, 4), cells.bytes());
  std::set<const float*> begins;
  for (int layer = 0; layer < 3; ++layer) {
    const ops::OpenKeys keys = cells.layer(layer);
    EXPECT_EQ(keys.step_cells, nullptr);
    for (int cell = 0; cell < 4; ++cell) {
      for (int head = 0; head < 2; ++head) begins.insert(keys.cells + cell * keys.cell_stride + head * 16 * 16);
    }
  }
  EXPECT_EQ(begins.size(), 4u * 3 * 2);
  EXPECT_EQ(*begins.rbegin() - *begins.begin(), cells.bytes() / 4 - 16 * 16);
}

TEST(OpenCells, AStorageHasThemIfItIsTold) {
  const KvShape shape{quant::KvFormat::int4, 2, 1, 16};
  EXPECT_EQ(KvStorage(shape, 1).open_layer(0).cells, nullptr);
  const KvStorage storage(shape, 1, nullptr, 2);
  EXPECT_EQ(storage.open_layer(1).cells - storage.open_layer(0).cells, 16 * 16);
  EXPECT_THROW(storage.open_layer(2), Error);
  EXPECT_THROW(OpenCells(shape, 0), Error);
}

}  // namespace
}  // namespace nb::kv
