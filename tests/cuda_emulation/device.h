// The emulator as a device with memory of its own: what tests give a backend or an engine instead of a GPU.
#pragma once

#include <cstddef>

#include "ops/backends.h"
#include "tensor/device_memory.h"

namespace nb::emulation {

/// Memory that only kernels and copies can touch: whoever else does ends the program. Poisoned when handed out; a write
/// past the end of a piece is found, and ends the program, when the piece is given back.
const DeviceMemory& device_memory();

/// Bytes that are handed out.
std::size_t device_bytes_in_use();

/// From now on an allocation that would bring the bytes in use above this fails.
void set_device_bytes(std::size_t bytes);

/// What has been done to the device, ever, by calls of its memory's functions.
struct DeviceCalls {
  std::size_t copies_in = 0, copies_out = 0;
  std::size_t graphs = 0;   ///< recorded
  std::size_t replays = 0;  ///< of graphs
  std::size_t graphs_alive = 0;
};
DeviceCalls device_calls();

/// How recording fails from now on.
enum class Refusal { none, at_begin, at_end };
void refuse_recording(Refusal refusal);

/// Backend "cuda-emulated": the kernels of cuda/ on that memory.
const ops::Backend& backend();

/// Backend "reference-on-device": the operators of the reference on that memory, which shows what the host side does
/// wrong without any kernel.
const ops::Backend& reference_backend();

}  // namespace nb::emulation
