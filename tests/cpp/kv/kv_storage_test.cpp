#include "kv/kv_storage.h"

#include <gtest/gtest.h>

#include <set>

#include "base/error.h"

namespace nb::kv {
namespace {

TEST(KvStorage, CellsTileABlockWithoutOverlap) {
  const KvShape shape{quant::KvFormat::bf16, 3, 2, 32};
  KvStorage storage(shape, 4);
  EXPECT_EQ(shape.block_bytes(), 16 * 32 * 2 * 2 * 2 * 3);
  EXPECT_EQ(storage.bytes(), 4 * shape.block_bytes());
  std::set<const std::uint8_t*> cells;
  for (int layer = 0; layer < 3; ++layer) {
    const ops::KvLayer view = storage.layer(layer);
    EXPECT_EQ(view.cell_bytes, 16 * 32 * 2);
    for (int block = 0; block < 4; ++block) {
      for (int cell = 0; cell < 2 * 2; ++cell) {
        cells.insert(view.base + block * view.block_stride + cell * view.cell_bytes);
      }
    }
  }
  EXPECT_EQ(cells.size(), 3u * 4 * 4);
  EXPECT_EQ(*cells.rbegin() - *cells.begin(), storage.bytes() - 16 * 32 * 2);
}

TEST(KvStorage, ZeroClearsOneBlockOnly) {
  KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 3);
  const ops::KvLayer layer = storage.layer(0);
  std::fill(layer.base, layer.base + storage.bytes(), std::uint8_t{7});
  storage.zero(1);
  EXPECT_EQ(layer.base[layer.block_stride - 1], 7);
  EXPECT_EQ(layer.base[layer.block_stride], 0);
  EXPECT_EQ(layer.base[2 * layer.block_stride - 1], 0);
  EXPECT_EQ(layer.base[2 * layer.block_stride], 7);
}

TEST(KvStorage, RefusesBlocksAndLayersItDoesNotHave) {
  KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 3);
  EXPECT_THROW(storage.zero(3), Error);
  EXPECT_THROW(storage.zero(-1), Error);
  EXPECT_THROW(storage.layer(1), Error);
  EXPECT_THROW(KvStorage({quant::KvFormat::f32, 1, 1, 16}, 0), Error);
}

}  // namespace
}  // namespace nb::kv
