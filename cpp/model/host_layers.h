// Packed layers in host memory, from where a device fetches them: what a model has that is larger than its device.
//
// The memory is pinned where the system allows it, so that copies go at the full rate of the bus and beside the
// kernels. Filled by the thread that loads the model; then read by any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tensor/allocator.h"
#include "tensor/device_memory.h"

namespace nb::model {

class HostLayers {
 public:
  /// Room for blobs of these sizes. `memory`, the device's, outlives this. Throws out_of_memory.
  HostLayers(const DeviceMemory& memory, std::span<const std::int64_t> blob_bytes);
  ~HostLayers();
  HostLayers(const HostLayers&) = delete;
  HostLayers& operator=(const HostLayers&) = delete;

  /// Where a blob lies, or is to be packed.
  std::span<std::byte> blob(std::size_t index) const;
  /// Of all of them.
  std::int64_t bytes() const { return static_cast<std::int64_t>(memory_.bytes()); }

  /// When all are packed. What the system refuses to pin is copied all the same, and slower.
  void pin();
  bool is_pinned() const { return is_pinned_; }

  /// Copies a blob to `out` on the device, beside what that computes; returns when it is there. Throws device.
  void fetch(std::size_t index, std::span<std::byte> out) const;

 private:
  const DeviceMemory& device_;
  std::vector<std::size_t> offsets_;  // of each blob, and of the end
  Buffer memory_;
  bool is_pinned_ = false;
};

}  // namespace nb::model
