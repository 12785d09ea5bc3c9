// The GPU this library runs on: what it is, and its memory as the core sees it (tensor/device_memory.h).
//
// One device, one stream, one process. Nothing here throws; errors are kept until take_error() asks. The kernels' side
// of it, stream() and note_error(), is declared in launch.cuh.
#pragma once

#include <cstddef>

#include "tensor/device_memory.h"

namespace nb::cuda {

struct DeviceFacts {
  char name[256];          ///< "NVIDIA H200", or "" where there is none
  char why_unusable[512];  ///< "" if it can run here
  std::size_t total_bytes;
};

/// Looks once, without taking memory of the device or anything else that lasts.
const DeviceFacts& device_facts();

/// Memory of the first device. Only for a device that is usable.
const DeviceMemory& device_memory();

}  // namespace nb::cuda
