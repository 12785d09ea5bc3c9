#include "tensor/device_memory.h"

#include <algorithm>

#include "base/error.h"

namespace nb {

void check(const DeviceMemory& memory) {
  const char* error = memory.take_error();
  NB_CHECK(error == nullptr, device, memory.name, ": ", error);
}

Buffer allocate_on(const DeviceMemory& memory, std::size_t bytes) {
  void* data = memory.allocate(std::max<std::size_t>(bytes, 1));
  if (data == nullptr) check(memory);  // a device that fails gives no memory either
  NB_CHECK(data != nullptr, out_of_memory, memory.name, ": cannot allocate ", bytes, " bytes; ", memory.free_bytes(),
           " are free");
  return {static_cast<std::byte*>(data), bytes,
          std::shared_ptr<void>(data, [release = memory.release](void* pointer) { release(pointer); })};
}

Buffer copy_to(const DeviceMemory& memory, const void* data, std::size_t bytes) {
  Buffer buffer = allocate_on(memory, bytes);
  memory.copy_in(buffer.data(), data, bytes);
  return buffer;
}

}  // namespace nb
