// host_layers.cpp on a device of the tests: where blobs lie, what arrives, what a system may refuse.
#include "model/host_layers.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "base/code_of.h"
#include "io/blob_file.h"
#include "tensor/queued_device.h"

namespace nb::model {
namespace {

using test::QueuedDevice;

class OfHostLayers : public testing::Test {
 protected:
  OfHostLayers() { device_.reset(); }
  ~OfHostLayers() override {
    EXPECT_EQ(device_.pieces, 0);
    EXPECT_EQ(device_.pinned, 0) << "memory that stays pinned";
    device_.reset();
  }

  // Blobs full of their numbers.
  std::unique_ptr<HostLayers> filled() const {
    auto layers = std::make_unique<HostLayers>(device_.memory(), kSizes);
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      std::memset(layers->blob(i).data(), static_cast<int>(i) + 1, layers->blob(i).size());
    }
    return layers;
  }

  static inline const std::vector<std::int64_t> kSizes{100, 2 * io::kBlobAlignment, io::kBlobAlignment + 1};
  QueuedDevice& device_ = QueuedDevice::get();
};

TEST_F(OfHostLayers, BlobsLieOneBehindTheOtherAndAligned) {
  const auto layers = filled();
  EXPECT_EQ(layers->bytes(), 5 * static_cast<std::int64_t>(io::kBlobAlignment));
  for (std::size_t i = 0; i < kSizes.size(); ++i) {
    EXPECT_GE(layers->blob(i).size(), static_cast<std::size_t>(kSizes[i]));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(layers->blob(i).data()) % io::kBlobAlignment, 0u);
  }
  EXPECT_EQ(layers->blob(1).data(), layers->blob(0).data() + layers->blob(0).size());
  EXPECT_EQ(layers->blob(2).data(), layers->blob(1).data() + layers->blob(1).size());
}

TEST_F(OfHostLayers, FetchesABlobPinnedOrNot) {
  for (const bool pins : {true, false}) {
    device_.pins = pins;
    const auto layers = filled();
    EXPECT_FALSE(layers->is_pinned());
    layers->pin();
    EXPECT_EQ(layers->is_pinned(), pins);
    EXPECT_EQ(device_.pinned, pins ? 1 : 0);
    const Buffer slot = allocate_on(device_.memory(), 3 * io::kBlobAlignment);
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      std::memset(slot.data(), 0, slot.bytes());
      layers->fetch(i, {slot.data(), slot.bytes()});
      const std::vector<std::byte> expected(layers->blob(i).size(), static_cast<std::byte>(i + 1));
      EXPECT_EQ(std::memcmp(slot.data(), expected.data(), expected.size()), 0) << i;
      EXPECT_EQ(slot.data()[expected.size()], std::byte{}) << "more than the blob";
    }
  }
}

TEST_F(OfHostLayers, ACopyThatFailsIsAnErrorOfTheDevice) {
  const auto layers = filled();
  const Buffer slot = allocate_on(device_.memory(), 3 * io::kBlobAlignment);
  device_.copies = false;
  EXPECT_EQ(code_of([&] { layers->fetch(0, {slot.data(), slot.bytes()}); }), ErrorCode::device);
  EXPECT_EQ(code_of([&] { layers->fetch(1, {slot.data(), io::kBlobAlignment}); }), ErrorCode::internal);  // too small
}

}  // namespace
}  // namespace nb::model
