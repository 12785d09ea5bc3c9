// The kernel tables of this library, over the memory they work on (a GPU's, or the emulator's).
#pragma once

#include "ops/kernel_table.h"
#include "tensor/device_memory.h"

namespace nb::cuda {

/// Fast kernels, chosen by the number of rows.
const ops::KernelTable& kernels(const DeviceMemory& memory);

/// One matrix path and one attention path for every number of rows.
const ops::KernelTable& deterministic_kernels(const DeviceMemory& memory);

}  // namespace nb::cuda
