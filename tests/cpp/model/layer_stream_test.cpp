// layer_stream.cpp with readers of the test's own: what is in the slots, in which order it is read, what is refused.
#include "model/layer_stream.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "base/code_of.h"
#include "base/effort.h"
#include "io/blob_file.h"
#include "tensor/queued_device.h"

namespace nb::model {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kSlotBytes = 2 * io::kBlobAlignment;

// Layers of one matrix of 4 x 8 f32 that are nowhere.
std::vector<LayerWeights> layers_of(int count) {
  std::vector<LayerWeights> layers(static_cast<std::size_t>(count));
  for (LayerWeights& layer : layers) {
    layer.qkv.segments = {{quant::Format::f32, 4, 8, nullptr, 32, 64}};
    layer.qkv.offsets = {0};
    layer.qkv.bytes = 128;
  }
  return layers;
}

std::vector<int> all_of(int count) {
  std::vector<int> out;
  for (int i = 0; i < count; ++i) out.push_back(i);
  return out;
}

// A reader that fills a slot with the layer's number, and remembers the order.
struct Reader {
  std::chrono::microseconds time{0};
  std::atomic<int> failing{-1};  // this layer cannot be read
  std::mutex mutex{};
  std::vector<int> order{};

  LayerStream::Read function() {
    return [this](int layer, std::span<std::byte> out) {
      if (time > 0us) std::this_thread::sleep_for(time);
      {
        const std::lock_guard lock(mutex);
        order.push_back(layer);
      }
      NB_CHECK(layer != failing.load(), io, "layer ", layer, " cannot be read");
      std::memset(out.data(), layer + 1, out.size());
    };
  }
  std::vector<int> reads() {
    const std::lock_guard lock(mutex);
    return order;
  }
};

LayerStream::Options options_of(std::vector<int> streamed, int num_slots) {
  return {.streamed = std::move(streamed), .num_slots = num_slots, .slot_bytes = kSlotBytes};
}

bool holds(const LayerWeights& weights, int layer) {
  const std::uint8_t* const bytes = weights.qkv.segments.front().data;
  if (bytes == nullptr) return false;
  return bytes[0] == layer + 1 && std::memcmp(bytes, bytes + 1, 127) == 0;
}

// The layer is in its slot as long as it is acquired, however the reader runs meanwhile.
void use(LayerStream& stream, int layer) {
  const LayerWeights& weights = stream.acquire(layer);
  ASSERT_TRUE(holds(weights, layer)) << layer;
  std::this_thread::yield();
  ASSERT_TRUE(holds(weights, layer)) << layer;
  stream.release(layer);
  EXPECT_EQ(weights.qkv.segments.front().data, nullptr);  // using it now would not give old bytes
}

TEST(LayerStream, AscendingOrderReadsEachLayerOnceACycle) {
  for (const int num_slots : {2, 3, 5}) {
    Reader reader;
    LayerStream stream(layers_of(7), options_of(all_of(7), num_slots), reader.function());
    constexpr int kCycles = 4;
    for (int cycle = 0; cycle < kCycles; ++cycle) {
      for (int layer = 0; layer < 7; ++layer) use(stream, layer);
    }
    const std::vector<int> reads = reader.reads();
    // A reader that is never ahead keeps what the best of caches would: of 6 layers from one use to the next all slots
    // but one. What is read ahead comes on top.
    ASSERT_GE(6 * reads.size(), static_cast<std::size_t>(6 * 7 + (kCycles - 1) * 7 * (7 - num_slots)));
    ASSERT_LE(reads.size(), static_cast<std::size_t>(7 * kCycles + num_slots));
    for (std::size_t i = 0; i < 7; ++i) EXPECT_EQ(reads[i], static_cast<int>(i));
    for (std::size_t i = 1; i < reads.size(); ++i) EXPECT_LE((reads[i] - reads[i - 1] + 6) % 7, num_slots - 1);
  }
}

// Where the step waits for the reader, two slots take turns and the third saves a read a cycle.
TEST(LayerStream, SpareSlotsKeepTheirLayers) {
  Reader reader{.time = 2ms};
  LayerStream stream(layers_of(6), options_of(all_of(6), 3), reader.function());
  constexpr int kCycles = 6;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    for (int layer = 0; layer < 6; ++layer) use(stream, layer);
  }
  EXPECT_LT(reader.reads().size(), 6u * kCycles);
}

TEST(LayerStream, ReadsAheadWhileALayerIsInUse) {
  Reader reader;
  LayerStream stream(layers_of(6), options_of(all_of(6), 3), reader.function());
  stream.acquire(0);
  const auto has_read = [&](std::size_t count) {
    for (int i = 0; i < 2000 && reader.reads().size() < count; ++i) std::this_thread::sleep_for(1ms);
    return reader.reads().size() == count;
  };
  EXPECT_TRUE(has_read(3));  // two behind it, and no more than there are slots
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(reader.reads(), (std::vector<int>{0, 1, 2}));
  stream.release(0);
  EXPECT_TRUE(has_read(4));  // its slot is free
  use(stream, 1);
}

TEST(LayerStream, WhatFitsIntoTheSlotsIsReadOnce) {
  Reader reader;
  LayerStream stream(layers_of(5), options_of({1, 3}, 2), reader.function());
  EXPECT_FALSE(stream.has(0));
  EXPECT_TRUE(stream.has(3));
  for (int cycle = 0; cycle < 5; ++cycle) use(stream, 1), use(stream, 3);
  EXPECT_EQ(reader.reads(), (std::vector<int>{1, 3}));
  const StreamStats stats = stream.stats();
  EXPECT_EQ(stats.layers, 2);
  EXPECT_EQ(stats.slots, 2);
  EXPECT_EQ(stats.reads, 2);
  EXPECT_EQ(stats.read_bytes, 2 * 128);
  Reader one;
  LayerStream single(layers_of(3), options_of({2}, 1), one.function());
  for (int i = 0; i < 3; ++i) use(single, 2);
  EXPECT_EQ(one.reads(), std::vector<int>{2});
}

TEST(LayerStream, AnyOrderGivesTheRightLayer) {
  std::mt19937 random(3);
  const int rounds = is_reduced() ? 20 : 120;
  for (int round = 0; round < rounds; ++round) {
    const int num_layers = std::uniform_int_distribution(1, 9)(random);
    std::vector<int> streamed;
    for (int i = 0; i < num_layers; ++i) {
      if (i == 0 || random() % 3 != 0) streamed.push_back(i);
    }
    const int most = static_cast<int>(streamed.size());
    const int num_slots = std::uniform_int_distribution(std::min(2, most), std::min(5, most + 1))(random);
    Reader reader{.time = std::chrono::microseconds(random() % 3 * 100)};
    LayerStream stream(layers_of(num_layers), options_of(streamed, num_slots), reader.function());
    for (int i = 0; i < 60; ++i) {
      const int layer = streamed[random() % streamed.size()];
      const int run = static_cast<int>(random() % 4);  // then some in order
      const auto begin = std::find(streamed.begin(), streamed.end(), layer);
      for (auto at = begin; at != streamed.end() && at - begin <= run; ++at) use(stream, *at);
      if (random() % 16 == 0) std::this_thread::sleep_for(300us);
    }
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST(LayerStream, ASlowReaderIsWaitedFor) {
  Reader reader{.time = 20ms};
  LayerStream stream(layers_of(3), options_of(all_of(3), 2), reader.function());
  for (int layer = 0; layer < 3; ++layer) use(stream, layer);
  const StreamStats stats = stream.stats();
  EXPECT_GE(stats.wait_seconds, 0.04);
  EXPECT_GE(stats.read_seconds, 0.06);
}

TEST(LayerStream, AReadErrorIsThatOfWhoWantsTheLayer) {
  Reader reader{.failing = 2};
  LayerStream stream(layers_of(4), options_of(all_of(4), 3), reader.function());
  for (int attempt = 0; attempt < 3; ++attempt) {
    use(stream, 0);
    use(stream, 1);
    try {
      stream.acquire(2);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::io);
      EXPECT_STREQ(error.what(), "layer 2 cannot be read");
    }
  }
  const std::size_t before = reader.reads().size();
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(reader.reads().size(), before);  // nobody asks, so it is not tried again and again
  EXPECT_GE(stream.stats().errors, 3);
  reader.failing = -1;
  for (int layer = 0; layer < 4; ++layer) use(stream, layer);  // the disk is well again
}

TEST(LayerStream, RefusesWhatIsOutOfOrder) {
  Reader reader;
  LayerStream stream(layers_of(3), options_of({0, 2}, 2), reader.function());
  EXPECT_EQ(code_of([&] { stream.release(0); }), ErrorCode::internal);
  stream.acquire(0);
  EXPECT_EQ(code_of([&] { stream.acquire(2); }), ErrorCode::internal);
  EXPECT_EQ(code_of([&] { stream.release(2); }), ErrorCode::internal);
  stream.release(0);
  EXPECT_EQ(code_of([&] { stream.release(0); }), ErrorCode::internal);
  EXPECT_EQ(code_of([&] { stream.acquire(1); }), ErrorCode::internal);  // resident
  use(stream, 2);
}

TEST(LayerStream, EndsWhileItReads) {
  for (int i = 0; i < 20; ++i) {
    Reader reader{.time = 2ms};
    LayerStream stream(layers_of(4), options_of(all_of(4), 2), reader.function());
    if (i % 2 == 0) use(stream, i % 4);
  }
}

// On a device, whose kernels run long after they were started: nothing may come into a slot before they are done.
TEST(LayerStream, ADeviceIsDoneWithASlotBeforeItIsFilledAgain) {
  test::QueuedDevice& device = test::QueuedDevice::get();
  device.reset();
  for (const int num_slots : {2, 3}) {
    Reader reader;
    std::atomic<int> wrong = 0, right = 0;
    {
      LayerStream::Options options = options_of(all_of(6), num_slots);
      options.memory = &device.memory();
      LayerStream stream(layers_of(6), options, reader.function());
      EXPECT_EQ(device.pieces, 1);
      EXPECT_EQ(device.marks, num_slots);
      for (int step = 0; step < 3; ++step) {
        for (int layer = 0; layer < 6; ++layer) {
          const LayerWeights& weights = stream.acquire(layer);
          device.launch([&wrong, &right, layer, copy = weights] {
            std::this_thread::sleep_for(2ms);
            ++(holds(copy, layer) ? right : wrong);
          });
          stream.release(layer);
        }
      }
      device.finish();
    }
    EXPECT_EQ(right, 18) << num_slots;
    EXPECT_EQ(wrong, 0) << num_slots;
    EXPECT_EQ(device.pieces, 0);
    EXPECT_EQ(device.marks, 0);
  }
}

TEST(LayerStream, ADeviceWithoutMarksIsRefused) {
  test::QueuedDevice& device = test::QueuedDevice::get();
  device.reset();
  device.marks_left = 1;
  Reader reader;
  LayerStream::Options options = options_of(all_of(4), 2);
  options.memory = &device.memory();
  EXPECT_EQ(code_of([&] { LayerStream(layers_of(4), options, reader.function()); }), ErrorCode::device);
  EXPECT_EQ(device.pieces, 0);
  EXPECT_EQ(device.marks, 0);
  device.reset();
}

}  // namespace
}  // namespace nb::model
