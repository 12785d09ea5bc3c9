#include "model/host_layers.h"

#include "base/align.h"
#include "base/error.h"
#include "io/blob_file.h"

namespace nb::model {

HostLayers::HostLayers(const DeviceMemory& memory, std::span<const std::int64_t> blob_bytes)
    : device_(memory), offsets_{0} {
  for (const std::int64_t bytes : blob_bytes) {
    offsets_.push_back(offsets_.back() + io::blob_room(static_cast<std::uint64_t>(bytes)));
  }
  const auto arena = HostArena::create(offsets_.back());
  memory_ = arena->allocate(offsets_.back(), io::kBlobAlignment);
}

HostLayers::~HostLayers() {
  if (is_pinned_) device_.unpin(memory_.data());
}

std::span<std::byte> HostLayers::blob(std::size_t index) const {
  return {memory_.data() + offsets_[index], offsets_[index + 1] - offsets_[index]};
}

void HostLayers::pin() { is_pinned_ = device_.pin(memory_.data(), memory_.bytes()); }

void HostLayers::fetch(std::size_t index, std::span<std::byte> out) const {
  const std::span<const std::byte> from = blob(index);
  NB_ASSERT(out.size() >= from.size());
  NB_CHECK(device_.copy_in_beside(out.data(), from.data(), from.size()), device, device_.name, ": a layer of ",
           from.size(), " bytes cannot be copied from host memory");
}

}  // namespace nb::model
