// The emulator as a device with memory of its own: what tests give a backend or an engine instead of a GPU.
#pragma once

#include "ops/backends.h"
#include "tensor/device_memory.h"

namespace nb::emulation {

/// Host memory that is filled with poison when handed out, and counted.
const DeviceMemory& device_memory();

/// Bytes that are handed out.
std::size_t device_bytes_in_use();

/// From now on an allocation that would bring the bytes in use above this fails.
void set_device_bytes(std::size_t bytes);

/// Backend "cuda-emulated": the kernels of cuda/ on that memory.
const ops::Backend& backend();

}  // namespace nb::emulation
