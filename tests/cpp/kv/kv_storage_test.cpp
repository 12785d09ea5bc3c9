#include "kv/kv_storage.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <vector>

#include "base/error.h"
#include "quant/kv_format.h"

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
    EXPECT_EQ(view.key_cell_bytes, 16 * 32 * 2);
    EXPECT_EQ(view.value_cell_bytes, 16 * 32 * 2);
    for (int block = 0; block < 4; ++block) {
      for (int cell = 0; cell < 2 * 2; ++cell) {
        cells.insert(view.base + block * view.block_stride + cell * view.key_cell_bytes);
      }
    }
  }
  EXPECT_EQ(cells.size(), 3u * 4 * 4);
  EXPECT_EQ(*cells.rbegin() - *cells.begin(), storage.bytes() - 16 * 32 * 2);
}

// Where cells of keys and of values differ in size: no byte of a block belongs to two of them or to none.
TEST(KvStorage, EveryByteOfABlockIsInOneCell) {
  for (int i = 0; i < quant::kNumKvFormats; ++i) {
    for (const int head_dim : {16, 64, 80}) {
      const KvShape shape{static_cast<quant::KvFormat>(i), 3, 2, head_dim};
      KvStorage storage(shape, 2);
      EXPECT_EQ(storage.bytes(), 2 * shape.block_bytes());
      std::vector<int> owners(static_cast<std::size_t>(storage.bytes()), 0);
      for (int layer = 0; layer < 3; ++layer) {
        const ops::KvLayer view = storage.layer(layer);
        for (int block = 0; block < 2; ++block) {
          const std::int64_t keys = view.base - storage.layer(0).base + block * view.block_stride;
          const std::int64_t values = keys + view.num_kv_heads * view.key_cell_bytes;
          for (int head = 0; head < 2; ++head) {
            for (std::int64_t b = 0; b < view.key_cell_bytes; ++b) {
              ++owners[static_cast<std::size_t>(keys + head * view.key_cell_bytes + b)];
            }
            for (std::int64_t b = 0; b < view.value_cell_bytes; ++b) {
              ++owners[static_cast<std::size_t>(values + head * view.value_cell_bytes + b)];
            }
          }
        }
      }
      EXPECT_EQ(std::count(owners.begin(), owners.end(), 1), storage.bytes()) << quant::to_string(shape.format);
    }
  }
}

// What is promised of a format is what its memory takes: 2 % for what the table does not say.
TEST(KvStorage, MeasuredBitsAreThePromisedOnes) {
  for (const auto& [format, bits] :
       {std::pair{quant::KvFormat::int8, 8.25}, {quant::KvFormat::mixed, 6.6}, {quant::KvFormat::int4, 5.0}}) {
    const KvStorage storage({format, 30, 3, 64}, 100);
    const double elements = 100.0 * 16 * 30 * 3 * 64 * 2;
    EXPECT_NEAR(8.0 * static_cast<double>(storage.bytes()) / elements, bits, 0.02 * bits);
  }
}

// Pages of the storage that the system has provided.
std::int64_t resident_bytes(const KvStorage& storage) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t bytes = static_cast<std::size_t>(storage.bytes()) / page * page;
  std::vector<unsigned char> pages(bytes / page);
  EXPECT_EQ(mincore(storage.layer(0).base, bytes, pages.data()), 0);
  return std::count_if(pages.begin(), pages.end(), [](unsigned char flags) { return (flags & 1) != 0; }) *
         static_cast<std::int64_t>(page);
}

TEST(KvStorage, TouchesALittleBehindWhatIsUsed) {
  const KvShape shape{quant::KvFormat::f32, 8, 8, 128};  // blocks of 1 MiB
  KvStorage storage(shape, 40);
  const std::int64_t block = shape.block_bytes();
  ASSERT_EQ(block, 1 << 20);
  EXPECT_EQ(resident_bytes(storage), 0);
  int calls = 0;
  while (storage.touch_ahead(5 * block)) ++calls;
  EXPECT_EQ(calls, 3);
  EXPECT_GE(resident_bytes(storage), 5 * block);
  EXPECT_LE(resident_bytes(storage), 6 * block);
  storage.zero(0);
  storage.zero(9);
  while (storage.touch_ahead(5 * block)) ++calls;
  EXPECT_GE(resident_bytes(storage), 7 * block);
  storage.layer(0).base[39 * block] = 1;
  storage.zero(39);
  EXPECT_FALSE(storage.touch_ahead(5 * block)) << "all blocks have been used";
}

TEST(KvStorage, TouchingChangesNoUsedBlock) {
  const KvShape shape{quant::KvFormat::f32, 1, 1, 16};
  KvStorage storage(shape, 10);
  const ops::KvLayer layer = storage.layer(0);
  storage.zero(2);
  std::fill(layer.base, layer.base + 3 * shape.block_bytes(), std::uint8_t{7});
  while (storage.touch_ahead(1 << 20)) {
  }
  EXPECT_EQ(std::count(layer.base, layer.base + storage.bytes(), std::uint8_t{7}), 3 * shape.block_bytes());
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

TEST(KvStorage, ReadsAndWritesWholeBlocks) {
  const KvShape shape{quant::KvFormat::bf16, 2, 1, 16};
  KvStorage storage(shape, 4);
  const auto size = static_cast<std::size_t>(shape.block_bytes());
  std::vector<std::byte> from(size), to(size);
  for (std::size_t i = 0; i < size; ++i) from[i] = static_cast<std::byte>(i * 7);
  storage.zero(1);
  storage.zero(3);
  storage.write(2, from);
  storage.read(2, to);
  EXPECT_EQ(to, from);
  const std::span<std::byte> memory = storage.host_memory(2);
  EXPECT_TRUE(std::equal(memory.begin(), memory.end(), from.begin(), from.end()));
  for (const BlockId other : {1, 3}) {
    storage.read(other, to);
    EXPECT_EQ(std::count(to.begin(), to.end(), std::byte{0}), static_cast<std::ptrdiff_t>(size));
  }
  EXPECT_THROW(storage.read(2, std::span(to).first(size - 1)), Error);
  EXPECT_THROW(storage.write(2, std::span(from).first(size - 1)), Error);
  EXPECT_THROW(storage.read(4, to), Error);
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
