// pack_queue.cpp: whatever is packed in one phase, on any number of threads, holds the rows of its sources.
#include "ops/pack_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <stdexcept>

#include "ops/ops_fixture.h"
#include "quant/tile16.h"

namespace nb::ops {
namespace {

// Rows of a half-split head of 64 whose file interleaves the pairs.
std::int32_t within_head(std::int32_t row) { return row / 64 * 64 + row % 32 * 2 + row % 64 / 32; }

// Every row from far away.
std::int32_t reversed(std::int32_t row) { return 1199 - row; }

// Sources that count how often each of their rows was read.
struct CountedWeights {
  CountedWeights(quant::Format format, int rows, int cols, std::int32_t (*order)(std::int32_t) = nullptr)
      : weights(format, rows, cols, static_cast<unsigned>(rows)), reads(static_cast<std::size_t>(rows)) {
    source = weights.source();
    source.read_rows = [this, inner = source.read_rows](std::int32_t begin, std::int32_t count, std::byte* out) {
      for (std::int32_t i = 0; i < count; ++i) ++reads[static_cast<std::size_t>(begin + i)];
      inner(begin, count, out);
    };
    if (order != nullptr) source.file_row = order;
  }

  RandomWeights weights;
  std::vector<std::atomic<int>> reads;
  MatrixSource source;
};

void expect_rows(const LinearSegment& segment, const CountedWeights& of) {
  const MatrixSource& source = of.source;
  const auto cols = static_cast<std::size_t>(source.cols);
  const std::int64_t row_bytes = quant::row_bytes(source.format, source.cols);
  std::vector<float> expected(cols), packed(cols);
  for (std::int32_t row = 0; row < segment.rows; ++row) {
    const std::int32_t file_row = source.file_row ? source.file_row(row) : row;
    quant::unpack_row(source.format, of.weights.bytes.data() + file_row * row_bytes, source.cols, expected.data());
    const int strip = row / quant::kTileRows;
    quant::unpack_strip_row(source.format,
                            segment.data + strip / 2 * segment.pair_stride + strip % 2 * segment.strip_bytes,
                            source.cols, row % quant::kTileRows, packed.data());
    ASSERT_EQ(packed, expected) << quant::to_string(source.format) << " row " << row << " of " << segment.rows;
    if (!source.file_row) {
      ASSERT_EQ(of.reads[static_cast<std::size_t>(row)], 1) << row;
    }
  }
}

TEST(PackQueue, PacksAllGroupsAsTheirSourcesSay) {
  for (const int num_threads : {1, 3}) {
    ThreadPool pool(num_threads);
    // Small regions: groups in regions of their own and in common ones, and more than a page.
    const auto arena = HostArena::create(2 * kHugePageBytes);
    std::deque<CountedWeights> all;
    const auto add = [&](auto... args) -> MatrixSource { return all.emplace_back(args...).source; };
    PackQueue queue(WeightLayout::tile16);
    std::vector<LinearWeight> weights;
    const auto group = [&](std::vector<MatrixSource> sources, Grouping grouping) {
      weights.push_back(queue.add(sources, grouping, "auto", *arena));
    };
    using quant::Format;
    group({add(Format::q8_0, 5001, 960)}, Grouping::stacked);
    group(
        {add(Format::q4_k, 192, 512, within_head), add(Format::q6_k, 64, 512, within_head), add(Format::q5_0, 70, 512)},
        Grouping::stacked);
    group({add(Format::q4_1, 3333, 576), add(Format::q4_1, 3333, 576)}, Grouping::interleaved32);
    group({add(Format::bf16, 1200, 45, reversed)}, Grouping::stacked);
    group({add(Format::f32, 1, 7)}, Grouping::stacked);
    std::int64_t last = 0, total = 0;
    queue.run(pool, [&](std::int64_t done, std::int64_t of) {
      EXPECT_GT(done, last);
      EXPECT_LE(done, of);
      last = done;
      total = of;
    });
    std::int64_t file_bytes = 0;
    std::size_t next = 0;
    for (const LinearWeight& weight : weights) {
      for (const LinearSegment& segment : weight.segments) {
        const CountedWeights& of = all[next++];
        expect_rows(segment, of);
        file_bytes += static_cast<std::int64_t>(of.weights.bytes.size());
      }
    }
    EXPECT_EQ(next, all.size());
    if (num_threads == 1) {
      EXPECT_EQ(last, file_bytes);
      EXPECT_EQ(total, file_bytes);
    }
    queue.run(pool);  // empty now: reads nothing again
    EXPECT_EQ(all.front().reads.front(), 1);
  }
}

TEST(PackQueue, RethrowsWhatReadingThrows) {
  ThreadPool pool(2);
  const auto arena = HostArena::create();
  CountedWeights weights(quant::Format::q8_0, 6000, 960);
  MatrixSource source = weights.source;
  source.read_rows = [](std::int32_t begin, std::int32_t, std::byte*) {
    if (begin > 3000) throw std::runtime_error("the disk is gone");
  };
  PackQueue queue(WeightLayout::tile16);
  queue.add(std::span(&source, 1), Grouping::stacked, "auto", *arena);
  EXPECT_THROW(queue.run(pool), std::runtime_error);
}

}  // namespace
}  // namespace nb::ops
